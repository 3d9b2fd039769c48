"""Datasets at fsspec addresses (s3://, gs://, hf://, ...), with a bounded copy of their files here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from librobot.data.files import locked, written_whole
from librobot.errors import LibrobotError

EXTRAS = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
}
"""Which package knows an address; fsspec itself knows the others."""

CHUNK = 4 * 2**20


def is_remote(root: str | Path) -> bool:
    return "://" in str(root) and not str(root).startswith("file://")


def local_root(root: str | Path) -> Path:
    """`root` as a folder or file of this machine: an address is copied whole first, what is already here
    stays."""
    if is_remote(root):
        folder = RemoteFolder(str(root))
        folder.fetch_all(lambda name: True)
        return folder.local
    return Path(str(root).removeprefix("file://")).expanduser().absolute()


class RemoteFolder:
    """The files below an address, and those of them that are copied into `local`, which is named after the
    address and lies in $LIBROBOT_CACHE/remote.

    limit_gb: how much the files that `fetch` brings may take; those used longest ago give way. None: no
    limit. A file is copied under a temporary name by one process at a time, checked by its size, and copied
    again where its size or version at the address is another. Picklable; every process has a
    connection of its own.
    """

    def __init__(self, url: str, limit_gb: float | None = None) -> None:
        from librobot.data.sources.stored import default_cache_dir

        if limit_gb is not None and limit_gb <= 0:
            raise ValueError(f"local_cache_gb must be above 0 or null, found {limit_gb}")
        self.url, self.limit_gb = url.rstrip("/"), limit_gb
        name = self.url.rpartition("/")[2] or "root"
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.local = default_cache_dir() / "remote" / digest / name
        self._connection: tuple[int, Any, str] | None = None
        self.files = self._list()
        """Name -> (size, version)."""

    def _connect(self) -> tuple[Any, str]:
        if self._connection is None or self._connection[0] != os.getpid():
            import fsspec

            scheme = self.url.partition("://")[0]
            try:
                fs, path = fsspec.url_to_fs(self.url, skip_instance_cache=True)
            except (ImportError, ValueError) as error:
                package = EXTRAS.get(scheme)
                hint = f"install {package}" if package else "see fsspec's list of protocols"
                raise LibrobotError(
                    f"{self.url}: addresses of {scheme}:// are not known: {error}; {hint}"
                ) from error
            self._connection = os.getpid(), fs, path.rstrip("/")
        return self._connection[1:]

    def _list(self) -> dict[str, tuple[int, str]]:
        fs, top = self._connect()
        try:
            found = fs.find(top, detail=True)
        except FileNotFoundError:
            found = {}
        except Exception as error:  # every protocol has errors of its own
            raise LibrobotError(f"{self.url}: cannot be listed: {type(error).__name__}: {error}") from error
        if not found:
            raise LibrobotError(f"{self.url}: no files there; expected the folder of a dataset")
        return {
            name.lstrip("/")[len(top.lstrip("/")) :].lstrip("/"): (int(info["size"]), _version(info))
            for name, info in found.items()
        }

    def fetch_all(self, wanted: Callable[[str], bool]) -> None:
        """Copy every file whose name is `wanted`; these do not count against the limit."""
        from librobot.progress import ProgressBar

        names = [name for name in self.files if wanted(name) and not self._here(name)]
        if names:
            with ProgressBar(f"copying {self.url}", len(names)) as progress:
                for name in names:
                    self._copy(name)
                    progress.advance()

    def fetch(self, path: Path) -> Path:
        """`path`, below `local`, copied if need be; marked as used."""
        name = path.relative_to(self.local).as_posix()
        if name not in self.files:
            raise LibrobotError(f"{self.url}/{name}: missing; upload or copy the dataset again")
        if not self._here(name):
            if self.limit_gb is None:
                self._copy(name)
            else:  # one at a time: what one copy takes, another must not count on
                with locked(self.local.parent / "room.lock"):
                    if not self._here(name):
                        self._make_room(name, self.limit_gb)
                        self._copy(name)
        with contextlib.suppress(FileNotFoundError):  # another process made room just now
            os.utime(path)
        return path

    def _mark(self, name: str) -> Path:
        return self.local.parent / "versions" / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.json"

    def _here(self, name: str) -> bool:
        path, mark = self.local / name, self._mark(name)
        if not path.exists() or not mark.exists():
            return False
        return json.loads(mark.read_text()) == [name, *self.files[name]]

    def _copy(self, name: str) -> None:
        path, mark = self.local / name, self._mark(name)
        with locked(mark.with_suffix(".lock")):
            if self._here(name):
                return
            fs, top = self._connect()
            mark.unlink(missing_ok=True)
            with written_whole(path) as temporary:
                try:
                    with fs.open(f"{top}/{name}", "rb") as source, temporary.open("wb") as target:
                        while block := source.read(CHUNK):
                            target.write(block)
                except Exception as error:
                    raise LibrobotError(
                        f"{self.url}/{name}: cannot be read: {type(error).__name__}: {error}"
                    ) from error
                if temporary.stat().st_size != self.files[name][0]:
                    raise LibrobotError(
                        f"{self.url}/{name}: expected {self.files[name][0]} bytes, found "
                        f"{temporary.stat().st_size}; the file changed, or the connection was cut: try again"
                    )
            with written_whole(mark) as temporary:
                temporary.write_text(json.dumps([name, *self.files[name]]))

    def _make_room(self, name: str, limit_gb: float) -> None:
        """Remove the videos used longest ago. An open decoder goes on reading a file that is removed."""
        limit, own = limit_gb * 2**30, self.files[name][0]
        if own > limit:
            raise LibrobotError(
                f"{self.url}/{name}: {own / 2**30:.2g} GiB do not fit into data.source.local_cache_gb="
                f"{limit_gb:g}; raise it"
            )
        held = [path for path in (self.local / "videos").rglob("*") if path.is_file()]
        sizes = {path: path.stat() for path in held}
        total = sum(stat.st_size for stat in sizes.values())
        for path in sorted(held, key=lambda path: sizes[path].st_mtime_ns):
            if total + own <= limit:
                return
            path.unlink(missing_ok=True)
            total -= sizes[path].st_size

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connection": None}


def _version(info: dict[str, Any]) -> str:
    """What changes when a file's content does, as far as the protocol tells."""
    for key in ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "created"):
        if info.get(key) is not None:
            return str(info[key])
    return ""
