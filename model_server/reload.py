"""Makes a launcher replace its model server, and waits for the outcome.

    python -m model_server.reload [PID]    the launcher's pid; 1, as in a container, if it is not given

Exit code 0: replaced. Exit code 1: the old model server goes on; one line says why.
"""

import json
import socket
import sys
from collections.abc import Callable

from model_server.launcher import LEAVE_LIMIT, LOAD_LIMIT
from model_server.reload_requests import CREDENTIALS, control_address

WAIT_LIMIT = LOAD_LIMIT + LEAVE_LIMIT + 10  # seconds between two lines of the launcher


class NotReplaced(Exception):
    """The model server was not replaced; the message is one line that says why."""


def replace(pid: int, show: Callable[[str], None]) -> None:
    """Have the launcher `pid` replace its model server; `show` is called with its progress. Raises NotReplaced."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_LIMIT)
        try:
            connection.connect(control_address(pid))
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
            if CREDENTIALS.unpack(peer)[0] != pid:
                raise ConnectionRefusedError
            for line in connection.makefile():
                said = json.loads(line)
                if said["replaced"] is False:
                    raise NotReplaced(said["text"])
                show(said["text"])
                if said["replaced"]:
                    return
        except ConnectionRefusedError:
            raise NotReplaced(f"Process {pid} is not the launcher of a model server.") from None
        except TimeoutError:
            raise NotReplaced(f"The launcher did not answer within {WAIT_LIMIT} seconds.") from None
        except ConnectionError:
            pass
    raise NotReplaced("The launcher has ended, or belongs to another user.")


def main() -> None:
    """Replace the model server of one launcher, and print how it goes."""
    try:
        replace(int(sys.argv[1]) if len(sys.argv) > 1 else 1, lambda text: print(f"* {text}", flush=True))
    except ValueError:
        sys.exit(f"{sys.argv[1]} is not the pid of a launcher.")
    except NotReplaced as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
