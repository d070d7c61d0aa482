"""The web program for Apache: mod_wsgi loads this file and calls `application`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from run_web_server import create_app
from web.process import keep_to_own_cores, set_up_process, watch_redis

set_up_process()
application = create_app()
keep_to_own_cores(application.extensions["pipeline"].turns)
watch_redis(application.extensions["queue"])
