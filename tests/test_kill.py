"""`kill -9` at 20 random moments of a batch: it goes on, ends with the same results, and leaves nothing behind.

The moments fall on the runner, a worker or a kernel, while one notebook trains with checkpoints and two others run.
tools/kill_test.py does the same with `make reproduce` in a clone.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("kill_test", Path(__file__).parent.parent / "tools" / "kill_test.py")
kill_test = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kill_test)

TRAIN = """\
import hashlib
import torch
from leanvit import train
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 3))
images = torch.randn(60, 3, 2, 2)
data = [(image, i % 3) for i, image in enumerate(images)]
recipe = train.Recipe(batch_size=4, lr=1e-2, steps=400)
history = train.fit(model, data, recipe, checkpoint_dir=run.checkpoints / "a", checkpoint_every_s=0.1, progress=False)
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
run.metrics |= {"weights": hashlib.sha256(weights).hexdigest(), "loss": [e["loss"] for e in history.epochs]}
print(history.steps, run.metrics["weights"])"""

QUICK = "run.metrics['squares'] = [i**2 for i in range(9)]\nprint(run.metrics)"


def test_twenty_kills(repository):
    repository.notebook("1_trains", TRAIN)
    repository.notebook("2_quick", QUICK)
    repository.notebook("3_quick", QUICK)
    for name in ("1_trains", "2_quick", "3_quick"):
        repository.params(name)
    command = [sys.executable, "-m", "leanvit.run", "run", "--tier", "smoke", "--jobs", "2", "--report"]
    told = []
    counts = kill_test.run(repository.root, command, 20, seed=0, ignore="", say=told.append, longest=5.0)
    assert counts.total() == 20 and counts["runner"] >= 5 and counts["worker"] + counts["kernel"] >= 2, told
    names = {p.name for p in (repository.root / "outputs" / "smoke").iterdir() if p.name != "checkpoints"}
    assert names == {f"{n}.{kind}" for n in ("1_trains", "2_quick", "3_quick") for kind in ("ipynb", "json")}


def test_the_kill_test_can_fail(repository):
    """It notices a torn result, other numbers, a missing notebook and an orphan."""
    outputs = repository.root / "outputs" / "smoke"
    outputs.mkdir(parents=True)
    (outputs / "1_x.json").write_text('{"metrics": {"a"')
    with pytest.raises(kill_test.Failed, match="is torn"):
        kill_test.results(repository.root)
    (outputs / "1_x.json").write_text('{"metrics": {"a": 1}}')
    with pytest.raises(kill_test.Failed, match="taken for whole"):
        kill_test.results(repository.root)
    one = {"x": {"metrics": {"accuracy": 1, "fit_seconds": 2}, "verdicts": []}}
    two = {"x": {"metrics": {"accuracy": 1, "fit_seconds": 3}, "verdicts": []}}
    assert kill_test.differences(one, two, kill_test.MEASURED) == []
    assert len(kill_test.differences(one, two, "")) == 1 and len(kill_test.differences(one, {}, "")) == 1
    orphan = kill_test.start(repository.root, [sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert [p.pid for p in kill_test.processes(repository.root)] == [orphan.pid]
    finally:
        orphan.kill()
        orphan.wait()
    assert kill_test.processes(repository.root) == []
