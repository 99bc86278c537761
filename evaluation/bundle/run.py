"""Run a bundle: unpack the parts that have arrived, take the next steps, stop in time, hand out what was found.

`scq benchmark bundle` puts this file beside the parts, and `run.sh` starts it. It needs Python alone, because scq
itself is among what it unpacks. Call it as often as there are parts and time: it goes on where it stopped.

A bundle's manifest.json lists its parts, its files with the pieces that they are made of, and its steps. A step is a
command that is run until it has succeeded once. One that is stopped must be able to go on when it is run again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

GRACE = 25.0  # seconds that a stopped step has to save what it has
RESERVE = 15.0  # seconds for what is handed out at the end
CHUNK = 1 << 20
INDEX = "pieces.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Unpack, run, hand out.

    Returns:
        0 when all steps are done, 75 when there is more to do, 1 when a step failed.
    """
    parser = argparse.ArgumentParser(prog="run.sh", description="Unpack what has arrived, and go on.")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop before so many are over; 0: when all is done")
    parser.add_argument("--work", type=Path, help="folder for everything that is made; by default work/ beside this")
    parser.add_argument("--results", type=Path, help="folder for what is handed out, emptied by whoever takes it")
    parser.add_argument("--files", type=int, default=8, help="files in that folder at most")
    parser.add_argument("--megabytes", type=float, default=15.5, help="MiB of each of them at most")
    parser.add_argument(
        "--again", action="append", default=[], metavar="STEP", help="take a step anew; repeat for several"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    started = time.monotonic()
    here = Path(__file__).resolve().parent
    work = (options.work or here / "work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    manifest = json.loads((here / "manifest.json").read_text())
    missing, all_parts = unpack(manifest, here, work), len(manifest["parts"])
    say(f"{all_parts - len(missing)} of {all_parts} parts are here; missing: {', '.join(missing) or '-'}")
    failed, left = [], []
    for step in manifest["steps"]:
        name, done = step["name"], work / "done" / step["name"]
        if name in options.again:
            done.unlink(missing_ok=True)
        if done.is_file():
            continue
        if not all((work / path).exists() for path in step["needs"]):
            left.append(name)
            say(f"step {name} waits for parts")
            continue
        remaining = options.seconds - (time.monotonic() - started) - RESERVE if options.seconds else float("inf")
        if remaining < step["least_seconds"]:
            left.append(name)
            say(f"step {name} waits for the next call: {remaining:.0f} seconds are left")
            break
        code = run_step(step, work, min(remaining, step["most_seconds"]))
        if code == 0 or not step["required"]:
            done.parent.mkdir(exist_ok=True)
            with atomic_write(done) as file:
                file.write(f"{code}\n".encode())
        if code == 75:
            left.append(name)
        elif code != 0:
            failed.append(name)
        if code != 0 and step["required"]:
            break
    if options.results:
        hand_out(manifest, work, options.results, options.files, int(options.megabytes * 2**20))
    say(f"failed: {', '.join(failed) or '-'}; left: {', '.join(left) or '-'}; {time.monotonic() - started:.0f} s")
    return 1 if failed else 75 if left else 0


def say(text: str) -> None:
    print(f"[bundle] {text}", flush=True)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """As `engine.files.atomic_write`, which is not there before it is unpacked: complete, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def unpack(manifest: dict[str, Any], here: Path, work: Path) -> list[str]:
    """Write every file whose pieces have all arrived, each checked and each once; the parts that have not come yet.

    A part that has come need not stay: it is kept in ``work``. Where a later manifest has other contents for a file, as
    after a mended bug, these replace it.
    """
    kept, arrived = work / "parts", {}
    kept.mkdir(parents=True, exist_ok=True)
    for part in manifest["parts"]:
        for path in (here / part["name"], kept / part["name"]):
            if path.is_file() and path.stat().st_size == part["bytes"] and _sha256(path) == part["sha256"]:
                arrived[part["name"]] = path
                if path.parent == here:
                    shutil.copyfile(path, kept / part["name"])
                break
            if path.is_file() and path.parent == here:
                say(f"{part['name']} is damaged, or of another bundle: send it again")
    known_file = work / "unpacked.json"
    known: dict[str, str] = json.loads(known_file.read_text()) if known_file.is_file() else {}
    opened = {name: tarfile.open(path) for name, path in arrived.items()}  # noqa: SIM115, closed below
    for file in manifest["files"]:
        target, whole = work / file["path"], all(part in opened for part, _ in file["pieces"])
        if not whole or known.get(file["path"]) == file["sha256"]:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with atomic_write(target) as out:
            for block in _decompressed(file, opened):
                digest.update(block)
                out.write(block)
            if digest.hexdigest() != file["sha256"]:
                raise SystemExit(f"{file['path']} is damaged in {', '.join(part for part, _ in file['pieces'])}")
        if target.suffix == ".whl":  # a zip file of what belongs on Python's path
            zipfile.ZipFile(target).extractall(target.parent)
        known[file["path"]] = file["sha256"]
    _write_json(known_file, known)
    for each in opened.values():
        each.close()
    return [part["name"] for part in manifest["parts"] if part["name"] not in arrived]


def _decompressed(file: dict[str, Any], opened: dict[str, tarfile.TarFile]) -> Iterator[bytes]:
    decompressor = zlib.decompressobj() if file["compressed"] else None
    for part, member in file["pieces"]:
        stream = opened[part].extractfile(member)
        while stream is not None and (block := stream.read(CHUNK)):
            yield block if decompressor is None else decompressor.decompress(block)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_step(step: dict[str, Any], work: Path, seconds: float) -> int:
    """Run a step's command in ``work`` for at most so long; its exit code, 75 if it was stopped in time."""
    say(f"step {step['name']}: {' '.join(step['command'])}")
    folders = [work / "site", work / "code"]
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable if word == "{python}" else word for word in step["command"]]
    log = work / "logs" / f"{step['name']}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        # A group of its own, so that it can be ended with all that it started; not a session, which would outlive ours.
        process = subprocess.Popen(command, cwd=work, env=environment, stdout=file, stderr=file, process_group=0)
        started = time.monotonic()
        try:
            code = _wait(process, seconds)
        except BaseException:  # this script itself is stopped
            os.killpg(process.pid, signal.SIGTERM)
            _wait(process, GRACE)
            raise
    if code is None:
        say(f"step {step['name']} is stopped after {seconds:.0f} s, to go on in the next call")
        os.killpg(process.pid, signal.SIGTERM)
        if _wait(process, GRACE) is None:
            say(f"step {step['name']} did not end within {GRACE:.0f} s, and is killed")
        code = 75
    # Whatever it left behind would go on, and hold the accelerator.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    lines = log.read_text(errors="replace").splitlines()
    say(f"step {step['name']} ended with {code} after {time.monotonic() - started:.0f} s; its last lines:")
    print("\n".join(f"    {line[-300:]}" for line in lines[-12:]), flush=True)
    return code


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    try:
        return process.wait(None if seconds == float("inf") else max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def hand_out(manifest: dict[str, Any], work: Path, results: Path, files: int, size: int) -> None:
    """Write what was found to ``results``: all small files, and as many pieces of the models as there is room for.

    Models are cut into pieces. Each piece is handed out once, so that several calls bring all of them.
    """
    results.mkdir(parents=True, exist_ok=True)
    report = results / "report.tar.xz"
    with atomic_write(report) as file, tarfile.open(fileobj=file, mode="w:xz", preset=6) as archive:
        for pattern in manifest["report"]:
            for path in sorted(work.glob(pattern)):
                if path.is_file() and not path.is_symlink():
                    archive.add(path, path.relative_to(work), recursive=False)
    if report.stat().st_size > size:
        say(f"{report.name} has {report.stat().st_size / 2**20:.1f} MiB, which may be more than comes back")
    queue = work / "queue"
    queue.mkdir(exist_ok=True)
    index_file = queue / INDEX
    index: dict[str, Any] = json.loads(index_file.read_text()) if index_file.is_file() else {}
    for pattern in manifest["models"]:
        for path in sorted(work.glob(pattern)):
            name = re.sub(r"[^A-Za-z0-9_.-]", "_", str(path.relative_to(work)))
            stamp = [f"{each.relative_to(path.parent)} {each.stat().st_mtime_ns}" for each in _files(path)]
            if name not in index or index[name]["stamp"] != stamp:
                index[name] = {"stamp": stamp, "pieces": _cut(path, work, queue, name, size)}
    waiting = [piece for entry in index.values() for piece in entry["pieces"] if not piece["handed_out"]]
    for piece in waiting[: files - 2]:
        shutil.copyfile(queue / piece["name"], results / piece["name"])
        piece["handed_out"] = True
    _write_json(results / INDEX, index)
    _write_json(index_file, index)
    for piece in waiting[: files - 2]:
        (queue / piece["name"]).unlink()
    say(f"{min(len(waiting), files - 2)} pieces of models are handed out, {max(0, len(waiting) - files + 2)} wait")


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def _cut(path: Path, work: Path, queue: Path, name: str, size: int) -> list[dict[str, Any]]:
    """A tar file of ``path``, compressed, in pieces of ``size`` bytes."""
    whole = queue / f"{name}.tar.xz"
    with atomic_write(whole) as file, tarfile.open(fileobj=file, mode="w:xz", preset=1) as archive:
        for each in _files(path):
            archive.add(each, each.relative_to(work), recursive=False)
    pieces = []
    with whole.open("rb") as file:
        while block := file.read(size):
            piece = {"name": f"{whole.name}.{len(pieces):03d}", "sha256": hashlib.sha256(block).hexdigest()}
            with atomic_write(queue / piece["name"]) as out:
                out.write(block)
            pieces.append({**piece, "bytes": len(block), "handed_out": False})
    whole.unlink()
    return pieces


if __name__ == "__main__":
    raise SystemExit(main())
