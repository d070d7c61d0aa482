"""What Apache loads: mod_wsgi looks for `application`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from run_web_server import start  # noqa: E402

application = start()
