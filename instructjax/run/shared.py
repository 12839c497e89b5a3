"""A directory that several hosts share, on a disk or in a bucket, and that one run locks."""

import secrets
import socket

import jax
from etils import epath

from instructjax import hosts


def check_shared(directory: epath.Path) -> None:
    """Checks that all hosts see one another's files in a directory. All hosts call this.

    Two hosts may each have a directory of this name on a disk of its own.

    Raises:
      OSError: host 0 does not see a file of this host, or this host none of host 0.
    """
    if jax.process_count() == 1:
        return
    token = hosts.agree_text(secrets.token_hex(8))
    host, others = jax.process_index(), range(1, jax.process_count())
    mine = directory / f".host-{host}-{token}"
    try:
        mine.write_text("")
        seen = True
    except OSError:
        seen = False
    hosts.wait_for_all("files of a shared directory are written")
    unseen = [other for other in ([0] if host else others) if not _sees(directory, other, token)]
    hosts.wait_for_all("files of a shared directory are read")
    mine.unlink(missing_ok=True)
    if unseen or not seen:
        raise OSError(
            f"{directory}: host {host} does not see what host {(unseen or [host])[0]} wrote there:"
            " give --checkpoints a directory that all hosts share"
        )


def _sees(directory: epath.Path, host: int, token: str) -> bool:
    return (directory / f".host-{host}-{token}").exists()


class Claim:
    """This run's mark on its directory of checkpoints: the last run to start holds it.

    A file system without locks, or a bucket, cannot tell that a run has ended. So a new run takes
    the directory over, and the old one, if it still lives, ends before it saves again.
    """

    def __init__(self, directory: epath.Path):
        self._file = directory / ".holder"
        self._mark = f"{secrets.token_hex(8)} {socket.gethostname()}"
        if jax.process_index() == 0:
            self._file.write_text(self._mark)

    def check(self) -> None:
        """Raises OSError on host 0 if another run has taken the directory over since.

        A run that takes it over leaves its own mark. So a mark that was removed is written again.
        """
        if jax.process_index() != 0:
            return
        try:
            mark = self._file.read_text()
        except FileNotFoundError:
            self._file.write_text(self._mark)
            return
        if mark != self._mark:
            host = mark.partition(" ")[2]
            raise OSError(
                f"{self._file.parent}: a run on {host} has taken these checkpoints over; give each"
                " run its own --checkpoints"
            )
