"""The data directory: which TFDS sets it holds, how one is opened, and how another is prepared.

A set is always looked for on disk first. If TFDS is asked for a set that is not there, it takes minutes without a
network, or raises errors about something else. Nothing here imports TensorFlow, but TFDS does while it prepares some
sets.
"""

import contextlib
import io
import os
import re
import shlex
import socket
import threading
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from training.errors import NoDataSetError, UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

EMBEDDED = "digits"
"""The set that comes with this package. It is prepared on first use."""

CONNECT_SECONDS = 3.0
"""How long a download host may take to answer before the network counts as absent."""

_NAME = re.compile(r"\w+(/[\w.\-]+)?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def data_directory(directory: Path | None) -> Path:
    """Return the data directory: the one given, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def find(name: str, directory: Path) -> Path | None:
    """Return the folder of the newest version of `name` in `directory`. If the set is not prepared: None.

    A folder counts if its name is a version number and it has a description inside. What an interrupted preparation
    leaves does not count.
    """
    if not _NAME.fullmatch(name):
        return None
    versions = [
        path.parent for path in (directory / name).glob("*/dataset_info.json") if _VERSION.fullmatch(path.parent.name)
    ]
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))), default=None)


def prepared_names(directory: Path) -> list[str]:
    """Return the sorted names of the sets in `directory`. A set with configurations appears as `name/config`."""
    names = {
        path.parent.parent.relative_to(directory).as_posix()
        for depth in ("*/*", "*/*/*")
        for path in directory.glob(f"{depth}/dataset_info.json")
    }
    return sorted(name for name in names if find(name, directory))


def prepare_command(name: str, directory: Path) -> str:
    """Return the shell command that prepares `name` in `directory`."""
    return f"python -m training.data prepare {shlex.quote(name)} --dir {shlex.quote(str(directory))}"


def open_set(name: str, directory: Path) -> "tfds.core.DatasetBuilder":
    """Open a prepared set. The embedded set is prepared if it is not there.

    Parameters
    ----------
    name : str
        `name` or `name/config`. TFDS need not know it. The newest version is opened.
    directory : Path
        The data directory.

    Returns
    -------
    tfds.core.DatasetBuilder
        Read-only, its files in array_record format.

    Raises
    ------
    UserError
        The set is unknown, not prepared, damaged in its description, or prepared in another file format.
    """
    import tensorflow_datasets as tfds  # It takes a third of a second, for which `--help` need not wait.

    folder = find(name, directory)
    if folder is None and name == EMBEDDED:
        folder = prepare(name, directory)
    if folder is None:
        raise _not_prepared(name, directory)
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # Parsers of several libraries run here, and each has exceptions of its own.
        raise damaged(name, folder, error) from error
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        file_format = builder.info.file_format
        raise UserError(
            f"data set {name!r} must be in array_record format; {folder} holds "
            f"{file_format.value if file_format else 'an unnamed format'}; choose another directory and run: "
            f"{prepare_command(name, Path('DIR'))}"
        )
    return builder


def prepare(name: str, directory: Path) -> Path:
    """Download a set known to TFDS and write it in array_record format, or write the embedded one.

    The folder gets its final name only when it is complete. Of several processes at once, the first wins.

    Parameters
    ----------
    name : str
        `name` or `name/config`.
    directory : Path
        The data directory; made if needed.

    Returns
    -------
    Path
        The folder of the prepared set. A folder that is already there is left as it is.

    Raises
    ------
    UserError
        TFDS does not know the set, its host does not answer within `CONNECT_SECONDS`, the preparation needs TensorFlow
        and it is missing, or writing fails.
    """
    if folder := find(name, directory):
        return folder
    builder = _new_builder(name, directory)
    _check_network(name, builder)
    # TFDS prints progress bars, which the tenth of a second for the embedded set is not worth.
    quiet = contextlib.ExitStack()
    if name == EMBEDDED:
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
    try:
        with quiet:
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # The code of any TFDS builder runs here.
        # If another process finished first, the final rename fails, and the set of that process is as good as ours.
        if find(name, directory) is None:
            raise _preparation_failed(name, directory, error) from error
    if folder := find(name, directory):
        return folder
    raise UserError(
        f"data set {name!r} must be complete or absent; {builder.data_dir} lacks dataset_info.json; remove that "
        f"folder and run: {prepare_command(name, directory)}"
    )


def damaged(name: str, folder: Path, error: Exception) -> UserError:
    """Return the error that says that the files of a set in a folder cannot be read."""
    directory = folder.parents[1 + name.count("/")]
    return UserError(
        f"data set {name!r} must be readable; its files in {folder} are damaged ({_summary(error)}); remove that "
        f"folder and run: {prepare_command(name, directory)}"
    )


def _new_builder(name: str, directory: Path) -> "tfds.core.DatasetBuilder":
    import tensorflow_datasets as tfds

    if name == EMBEDDED:
        from training.data.digits import Digits

        return Digits(data_dir=directory, file_format="array_record")
    base, _, config = name.partition("/")
    if not _NAME.fullmatch(name) or base not in tfds.list_builders(with_community_datasets=False):
        raise _not_prepared(name, directory)
    configs = tfds.builder_cls(base).builder_configs
    if config and config not in configs:
        raise UserError(
            f"the configuration of data set {base!r} must be one of: {', '.join(configs) or 'none'}; got {config!r}; "
            "choose one of these"
        )
    try:
        return tfds.builder(name, data_dir=directory, file_format="array_record")
    except Exception as error:  # The code of the builder runs here.
        raise _preparation_failed(name, directory, error) from error


def _check_network(name: str, builder: "tfds.core.DatasetBuilder") -> None:
    """Raise if a host of the set's files does not answer. TFDS itself would retry for minutes."""
    proxies = urllib.request.getproxies()
    for scheme, host in sorted({urlsplit(url)[:2] for url in builder.url_infos or ()}):
        via = urlsplit(proxies[scheme] if scheme in proxies and not urllib.request.proxy_bypass(host) else f"//{host}")
        port = via.port or (443 if scheme == "https" else 80)
        if via.hostname and not _answers(via.hostname, port, CONNECT_SECONDS):
            raise UserError(
                f"the host of data set {name!r} must be reachable; {via.hostname}:{port} did not answer; connect to "
                "the network, or prepare the set on another machine and copy its folder into the data directory"
            )


def _answers(host: str, port: int, seconds: float) -> bool:
    """Say whether a TCP connection opens in time. It runs in a thread, because a name look-up has no time limit."""
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=seconds):
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _not_prepared(name: str, directory: Path) -> UserError:
    import tensorflow_datasets as tfds

    names = prepared_names(directory)
    here = ", ".join(names) or "nothing"
    if configs := [other for other in names if other.startswith(f"{name}/")]:
        return UserError(f"data set {name!r} has configurations in {directory}; choose one of {', '.join(configs)}")
    if _NAME.fullmatch(name) and name.split("/")[0] in tfds.list_builders(with_community_datasets=False):
        return UserError(
            f"data set {name!r} must be prepared in array_record format; {directory} holds {here}; "
            f"with a network, and TensorFlow for most sets, run: {prepare_command(name, directory)}"
        )
    return no_data_set("the data set must be", name, directory)


def no_data_set(rule: str, name: str, directory: Path) -> NoDataSetError:
    """Return the error for the name of a set that is not known. It begins with `rule`, as in "the data set must be"."""
    here = ", ".join(prepared_names(directory)) or "nothing"
    return NoDataSetError(
        f"{rule} {EMBEDDED}, one prepared in {directory} (there: {here}), or one that TFDS knows; got {name!r}; choose "
        "one of these, or name the directory that holds it"
    )


def _preparation_failed(name: str, directory: Path, error: Exception) -> UserError:
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    if any(isinstance(cause, ImportError) for cause in causes):
        return UserError(
            f"data set {name!r} needs a package that is not installed ({_summary(causes[-1])}); many TFDS sets need "
            f"TensorFlow once, while they are prepared: install it (pip install tensorflow), here or in another "
            f"environment, and run: {prepare_command(name, directory)}"
        )
    return UserError(f"data set {name!r} could not be prepared in {directory}: {_summary(error)}")


def _summary(error: BaseException) -> str:
    """Return the type and the first line of an error, for a message of one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no details')}"
