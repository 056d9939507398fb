"""Compile a text of C++ into a library, once a machine: a cache on disk that is the user's alone.

An entry is a folder named by the hash of text, flags and compiler. It appears whole, by a rename, and holds the hash of
the library, which is compared before anything is loaded: what does not fit is thrown away and compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from samoyeds_codegen.errors import CacheError, CompilationError, CompilerNotFoundError
from samoyeds_codegen.files import UNFINISHED

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
DIRECTORY_VARIABLE = "SAMOYEDS_CACHE_DIR"
HASH = "kernel.sha256"
"""The file of an entry that has the hash of its result."""
LOG = "kernel.log"
"""The file of an entry that says how its result was made."""
SECONDS = 120
"""After this long a compiler is taken to hang."""


@dataclass(frozen=True)
class Source:
    """A text to compile: ``name`` is for people, ``flags`` come after `FLAGS`."""

    name: str
    text: str
    flags: tuple[str, ...] = ()


def load(source: Source) -> ctypes.CDLL:
    """The library of a text, compiled unless the cache has it.

    Raises:
        CompilerNotFoundError: there is no compiler.
        CompilationError: it refused the text.
        CacheError: there is no folder for the result.
    """
    compiler = find_compiler()
    entry = cached(
        f"{source.name}-{_key(source, compiler)}", "kernel.so", lambda folder: _compile_into(folder, source, compiler)
    )
    try:
        return ctypes.CDLL(str(entry / "kernel.so"))
    except OSError as error:
        raise CompilationError(f"{entry / 'kernel.so'} cannot be loaded: {error}") from error


def compile_log(library: ctypes.CDLL) -> str:
    """How a library of `load` was compiled: compiler, flags, seconds, messages; empty if its entry is gone."""
    try:
        return Path(library._name).with_name(LOG).read_text()
    except OSError:
        return ""


def load_all(sources: list[Source]) -> list[ctypes.CDLL]:
    """Several libraries, compiled at the same time."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(load, sources))


def cache_directory(of: str = "kernels") -> Path:
    """A folder in ``$SAMOYEDS_CACHE_DIR``, or else in the user's cache.

    Args:
        of: what it holds: compiled ``kernels``, or what was learned of ``devices``, which no hash vouches for.

    Raises:
        CacheError: it cannot be made, or others may write to it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get(DIRECTORY_VARIABLE) or Path(home) / "samoyeds") / of
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise CacheError(f"{path} cannot be made ({error}); set {DIRECTORY_VARIABLE} to a folder of yours") from error
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise CacheError(f"{path} may be written by others; give it mode 700, or set {DIRECTORY_VARIABLE}")
    return path


@dataclass(frozen=True)
class Entry:
    """What is kept of one text: a folder with a compiled result, or a file that is read as it stands (Triton)."""

    path: Path

    @property
    def name(self) -> str:
        """Kind of text and hash."""
        return self.path.name

    @property
    def title(self) -> str:
        """The first line of the text, without what makes it a comment."""
        texts = [self.path, *(self.path / name for name in ("kernel.cpp", "kernel.cu"))]
        text = next((path for path in texts if path.is_file()), None)
        if text is None:
            return ""
        with text.open() as lines:
            return lines.readline().strip('/" \n').removesuffix(" Generated, do not edit.")

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(file.stat().st_size for file in self._files())

    @property
    def sound(self) -> bool:
        """Whether the result is the one that was compiled, or the text the one that was written."""
        if self.path.is_file():
            return _hash(self.path)[:32] in self.name
        try:
            recorded = (self.path / HASH).read_text()
        except OSError:
            return False
        return any(_hash(file) == recorded for file in self._files() if file.name != HASH)

    def remove(self) -> None:
        """A process that has loaded the result keeps it."""
        if self.path.is_file():
            self.path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _files(self) -> list[Path]:
        return [self.path] if self.path.is_file() else [file for file in self.path.iterdir() if file.is_file()]


def entries() -> list[Entry]:
    """All that is kept, by name.

    Raises:
        CacheError: there is no folder, or others may write to it.
    """
    return [Entry(path) for path in sorted(cache_directory().iterdir()) if not path.name.startswith(UNFINISHED)]


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: how it is called, which may be several words (``ccache g++``), and what it says it is."""

    command: str
    version: str

    @property
    def words(self) -> list[str]:
        """The command as a list of arguments."""
        return shlex.split(self.command)


def find_compiler() -> Compiler:
    """The compiler that ``$CXX`` names, or else the one that Inductor takes.

    Raises:
        CompilerNotFoundError: there is none.
    """
    return _find_compiler(os.environ.get("CXX", ""))


@functools.lru_cache(maxsize=8)
def _find_compiler(wanted: str) -> Compiler:
    command = wanted or _compiler_of_inductor()
    try:
        asked = [*shlex.split(command), "--version"]
        version = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=SECONDS)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise CompilerNotFoundError(f"{command} does not work as a C++ compiler ({error}); set $CXX to one") from error
    return Compiler(command, version.stdout)


def _compiler_of_inductor() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return str(get_cpp_compiler())
    except Exception as error:  # Inductor's own kinds of errors differ between versions
        raise CompilerNotFoundError(f"no C++ compiler was found ({error}); install g++, or set $CXX") from error


def _key(source: Source, compiler: Compiler) -> str:
    # The name of the log stands for what an entry holds: entries of earlier versions have none.
    parts = (source.text, *FLAGS, *source.flags, compiler.command, compiler.version, LOG)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def cached(name: str, result: str, fill: Callable[[Path], None]) -> Path:
    """An entry of the cache, made unless it is there and sound.

    Args:
        name: of the entry; it holds the hash of everything that the result depends on.
        result: the file that is verified.
        fill: puts the result, and what else is worth keeping, into an empty folder.

    Returns:
        The folder of the entry.

    Raises:
        CacheError: there is no folder for it.
    """
    entry = cache_directory() / name
    if not _is_sound(entry, result):
        _make(entry, result, fill)
    return entry


def _is_sound(entry: Path, result: str = "kernel.so") -> bool:
    """Whether an entry is there and its result is the one that was made."""
    try:
        return _hash(entry / result) == (entry / HASH).read_text()
    except OSError:
        return False


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make(entry: Path, result: str, fill: Callable[[Path], None]) -> None:
    """Fill a folder of its own, and rename it to ``entry``; another process may do the same and be first."""
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=UNFINISHED, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "entry"
        made.mkdir(mode=0o700)
        fill(made)
        (made / HASH).write_text(_hash(made / result))
        if entry.exists() and not _is_sound(entry, result):
            shutil.rmtree(entry, ignore_errors=True)
        try:
            made.rename(entry)
        except OSError as error:
            if not _is_sound(entry, result):
                raise CacheError(f"{entry} cannot be written ({error}); set another {DIRECTORY_VARIABLE}") from error


def _compile_into(folder: Path, source: Source, compiler: Compiler) -> None:
    text, library = folder / "kernel.cpp", folder / "kernel.so"
    text.write_text(source.text)
    command = [*compiler.words, str(text), *FLAGS, *source.flags, "-o", str(library)]
    start = time.perf_counter()
    said = _compile(command)
    seconds, shown = time.perf_counter() - start, [word.removeprefix(f"{folder}/") for word in command]
    (folder / LOG).write_text(log_text(compiler.version, shown, seconds, said))


def log_text(compiler: str, command: list[str], seconds: float, said: str) -> str:
    """A log, for people.

    Args:
        compiler: which, and its version; the first line counts.
        command: with all flags.
        seconds: that it took.
        said: by the compiler; often nothing.
    """
    lines = (compiler.partition("\n")[0], shlex.join(command), f"{seconds:.2f} s", said.strip() or "no messages")
    return "\n".join(lines) + "\n"


def _compile(command: list[str]) -> str:
    """Run a compiler; what it says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilationError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise CompilationError(f"{' '.join(command)}:\n{done.stderr}")
    return done.stdout + done.stderr
