"""One run in a process of its own: `python -m leanvit.worker`, started by run.py, the job as JSON on standard input.

Executes a notebook through papermill into <run>.partial.ipynb, where the notebook's last cell writes its result to a
staging file. When both are whole, the normalised notebook and then, last, the result are renamed to their places: a
result that is there is complete. A failed run leaves <run>.failed.ipynb. When the parent process disappears, the kernel
is killed and so is this process.
"""

import base64
import io
import json
import logging
import os
import re
import signal
import sys
from pathlib import Path

from leanvit import orphans, record

TRANSIENT = ("papermill", "execution")  # timing and the like: it would make every run a difference in git
CELL_FILE = re.compile(r"\S*[/\\]ipykernel_\d+[/\\]\d+\.py")  # where warnings say they come from; holds a process id
START_TIMEOUT_S = 120


def main() -> int:
    """Exit code 0 only when the result and the executed notebook are in their places.

    Whatever the notebook raises, and the `RuntimeError` of a result that is not complete, is logged and gives 1.
    """
    job = json.load(sys.stdin)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "pthread_sigmask"):  # Ray's processes block Ctrl-C; the kernel, a child of this one, needs it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    orphans.end_with(job["parent"])  # with the kernel
    result = Path(job["result"])
    staged, partial = record.staged(result), result.with_suffix(".partial.ipynb")
    with _lock(Path(job["lock"]), job["lock_timeout_s"]):
        staged.unlink(missing_ok=True)
        try:
            _execute(job, partial)
            problems = _problems(staged, job)
            if problems:
                raise RuntimeError(f"the result is not complete: {'; '.join(problems)}")
            _normalise(partial)
        except BaseException as error:
            if partial.exists():
                partial.replace(result.with_suffix(".failed.ipynb"))
            staged.unlink(missing_ok=True)
            _log_error(error)
            return 1
        partial.replace(result.with_suffix(".ipynb"))
        os.utime(staged)  # later than the log's last word: see pool.tidy
        staged.replace(result)
        result.with_suffix(".failed.ipynb").unlink(missing_ok=True)
    return 0


def _lock(path: Path, timeout_s: float):
    import filelock

    path.parent.mkdir(exist_ok=True)
    try:
        return filelock.FileLock(path).acquire(timeout=timeout_s)
    except filelock.Timeout:
        sys.exit("another leanvit process is executing this run")


def _execute(job: dict, partial: Path) -> None:
    import papermill

    papermill.execute_notebook(
        job["notebook"],
        str(partial),
        parameters=job["parameters"],
        kernel_name="python3",
        progress_bar=False,
        log_output=True,
        start_timeout=START_TIMEOUT_S,
        execution_timeout=job["cell_timeout_s"],
    )


def _problems(staged: Path, job: dict) -> list[str]:
    if not staged.exists():
        return ["the notebook ran to its end but wrote none; its last cell must call run.save()"]
    result = json.loads(staged.read_text(encoding="utf-8"))
    problems = record.incomplete(result)
    if not problems and result["parameters"] != json.loads(record.scrub(json.dumps(job["parameters"]), Path.cwd())):
        problems.append(
            "its parameters are not those asked for; does the notebook call record.start(<its own name>, …)?"
        )
    return problems


def _normalise(path: Path) -> None:
    """Remove what changes from run to run without meaning, and absolute paths, from an executed notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for name in TRANSIENT:
        notebook["metadata"].pop(name, None)
    for cell in notebook["cells"]:
        for name in TRANSIENT:
            cell["metadata"].pop(name, None)
        if "injected-parameters" in cell["metadata"].get("tags", []):
            cell["id"] = "injected-parameters"
        for output in cell.get("outputs", []):
            _scrub_output(output)
    record.write_atomic(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def _scrub_output(output: dict) -> None:
    root = Path.cwd()
    texts = [(output, "text")] if "text" in output else []
    texts += [(output["data"], kind) for kind in output.get("data", {}) if kind.startswith("text/")]
    for holder, name in texts:
        text = CELL_FILE.sub("<cell>", "".join(holder[name]))
        holder[name] = record.scrub(text, root).splitlines(keepends=True)
    if "image/png" in output.get("data", {}):
        output["data"]["image/png"] = _with_palette("".join(output["data"]["image/png"]))


def _with_palette(png: str) -> str:
    """A figure with 256 colours of its own: a third of the bytes (base64), the same lines and letters to the eye."""
    from PIL import Image

    image, file = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] < 255:
        return png
    flat = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    flat.save(file, "PNG", optimize=True)
    smaller = base64.b64encode(file.getvalue()).decode() + "\n"
    return min(smaller, png, key=len)


def _log_error(error: BaseException) -> None:
    # papermill's own errors repeat the traceback that the notebook holds; the runner reads it there
    logging.error("%s: %s", type(error).__name__, str(error).strip().splitlines()[-1] if str(error).strip() else "")


if __name__ == "__main__":
    sys.exit(main())
