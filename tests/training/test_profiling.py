"""debug=profile: the files, and that the words follow from the times."""

import json

import pytest
from small_runs import fit, rows

from librobot.training.callbacks.utilisation import Utilisation
from librobot.training.profiling.summary import PHASES, Summary, advice


def test_a_profile_says_where_the_time_goes(dataset, tmp_path):
    options = ["debug=profile", "callbacks.profile.skip=1", "callbacks.profile.steps=2"]
    options += ["callbacks.profile.traced=1", "trainer.max_steps=5", "trainer.log_every_n_steps=1"]
    options += ["callbacks=[default,statistics]", "callbacks.gradients=null"]
    options += ["callbacks.utilisation.peak_tflops=0.5"]
    fit(dataset, tmp_path, *options)
    page = (tmp_path / "profile" / "summary.html").read_text()
    assert "2 steps on CPU" in page
    assert all(phase in page for phase in PHASES)
    assert "aten::" in page
    assert "http" not in page.replace("ui.perfetto", "")  # nothing is fetched
    names = {
        event.get("name")
        for event in json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    }
    assert any(str(name).startswith("aten::") for name in names)
    last = rows(tmp_path)[-1]
    assert 0 < float(last["speed/mfu"]) < 1
    assert float(last["speed/mfu"]) == pytest.approx(float(last["speed/tflops"]) / 0.5, rel=1e-4)
    assert float(last["speed/memory_gb"]) > 0.05


def summary(**seconds):
    made = dict.fromkeys(PHASES, 0.0) | {name.replace("_", " "): value for name, value in seconds.items()}
    return Summary("CPU", 10, 320, made, [], "32-true", 1)


def test_advice_follows_from_the_shares():
    waiting = advice(summary(data_wait=6.0, forward=2.0, backward=2.0))
    assert waiting[0] == "The step spends most of its time in: data wait (60%)."
    assert waiting[1].startswith("The step waits 60% of its time for data: data.num_workers=2")
    assert len(waiting) == 2
    busy = advice(summary(forward=4.0, backward=5.9, optimiser=0.1))
    assert "almost all of the time" in busy[1]
    both = advice(summary(forward=4.0, optimiser=3.0, other=3.5))
    assert both[1].startswith("Callbacks") or both[1].startswith("Callbacks and logging")
    assert both[2].startswith("The optimiser takes 29%")


def test_a_peak_of_nothing_is_refused():
    with pytest.raises(ValueError, match="peak_tflops must be above 0, found 0"):
        Utilisation(0)
