"""The command that finds rows and threads for a machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm4ehr.bundle import Network
from service import calibrate
from service.__main__ import main
from service.calibrate import Candidate, choose, choose_verified, measure, starts, thread_counts
from service.engine.backends.base import RowDependenceError
from service.engine.backends.shapes import slots_for
from service.settings import SETTINGS_FILE, Settings
from tests.online import save_tiny, tiny_bundle


def grid(n_cores: int, seconds: Callable[[int, int], float]) -> dict[Candidate, float]:
    return {
        Candidate(threads, rows): seconds(threads, rows)
        for threads in thread_counts(n_cores)
        for rows in (4, 8, 16, 32, 64, 128)
    }


@pytest.mark.parametrize(
    ("n_cores", "counts"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (16, [1, 2, 4, 8, 15, 16])]
)
def test_threads_that_are_tried(n_cores: int, counts: list[int]) -> None:
    assert thread_counts(n_cores) == counts


def test_the_most_rows_within_the_target() -> None:
    found = choose(grid(2, lambda threads, rows: 0.001 + rows * 0.0003), 0.02, 2)
    assert found == Candidate(1, 32)


def test_one_core_is_left_to_the_event_loop() -> None:
    perfect = grid(8, lambda threads, rows: rows * 0.001 / threads)
    assert choose(perfect, 0.02, 8).threads == 7


def test_a_thread_that_wins_little_is_not_used() -> None:
    wins = {1: 1.0, 2: 1.9, 4: 2.0, 7: 2.1, 8: 2.2}
    assert choose(grid(8, lambda t, rows: rows * 0.001 / wins[t]), 0.02, 8).threads == 2


def test_without_a_tick_within_the_target_the_shortest_one() -> None:
    assert choose(grid(4, lambda t, rows: rows / t), 0.02, 4) == Candidate(3, 4)


class Machine:
    """Ticks whose time is told, on a clock of their own."""

    def __init__(self, ms: Callable[[Candidate, int], float]) -> None:
        self.now = 0.0
        self.order: list[Candidate] = []
        self._ms = ms

    def tick(self, c: Candidate) -> bytes:
        self.order.append(c)
        self.now += self._ms(c, self.order.count(c)) / 1000
        return b"other" if c == Candidate(2, 8) else b"bits"


A, B, C, D = (Candidate(1, 4), Candidate(1, 8), Candidate(2, 4), Candidate(2, 8))


def test_measures_are_medians_of_interleaved_rounds() -> None:
    # The first of all ticks and one in the middle are slow.
    machine = Machine(lambda c, n: 100 if c == A and n in (1, 2, 6) else c.rows)
    measured = measure(machine.tick, [A, B, C, D], target_s=1, repeats=5, clock=lambda: machine.now)
    assert measured.seconds == {c: pytest.approx(c.rows / 1000) for c in (A, B, C, D)}
    assert machine.order == [A, A, B, B, C, C, D, D] * 6
    assert measured.other_bits == {D}
    assert "other bits" in calibrate.table(measured, A).splitlines()[4]


def test_what_takes_far_too_long_is_not_tried_again() -> None:
    machine = Machine(lambda c, n: 5 if c.threads == 1 else 500)
    measured = measure(machine.tick, [A, B, C, D], target_s=0.1, clock=lambda: machine.now)
    assert set(measured.seconds) == {A, B, C}
    assert machine.order.count(D) == 4


def test_the_command_writes_settings_that_the_service_reads(
    tiny_network: Callable[..., Network],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_tiny(tiny_network, tmp_path)
    monkeypatch.setenv("LLM4EHR_MODEL_REPOSITORY", str(tmp_path))
    monkeypatch.setenv("LLM4EHR_BUNDLE", "tiny/1")
    monkeypatch.setenv("LLM4EHR_KV_MEMORY_MIB", "1")
    monkeypatch.setattr(calibrate, "MAX_ROWS", 8)
    monkeypatch.setattr(calibrate, "cores", lambda: 2)
    file = tmp_path / "settings.env"
    assert main(["calibrate", "--out", str(file), "--target-ms", "1000"]) == 0
    table = capsys.readouterr().err
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [
        ["1", "4"], ["1", "8"], ["2", "4"], ["2", "8"],
    ]  # fmt: skip
    assert "8" in table[table.index("<-") - 40 : table.index("<-")]
    monkeypatch.setenv(SETTINGS_FILE, str(file))
    settings = Settings()
    assert (settings.engine_rows, settings.torch_threads) == (8, 1)
    assert main(["calibrate", "--target-ms", "1000"]) == 0
    assert capsys.readouterr().out == file.read_text()


def test_onnx_has_no_more_rows_than_half_of_its_slots(
    tiny_network: Callable[..., Network],
) -> None:
    bundle = tiny_bundle(tiny_network)
    assert calibrate.most_rows(bundle, Settings()) == 512
    slots = slots_for(bundle.network, 1 << 20)
    rows = calibrate.most_rows(bundle, Settings(backend="onnx-cpu", kv_memory_mib=1))
    assert slots / 4 < rows <= slots / 2 < 512


def test_what_the_service_would_refuse_is_not_chosen() -> None:
    seconds = grid(4, lambda threads, rows: 0.001 + rows * 0.0001 / threads)
    best = choose(seconds, 0.02, 4)
    refused = {best}
    found = choose_verified(seconds, 0.02, 4, lambda c: c not in refused)
    assert found not in refused
    assert found == choose({c: s for c, s in seconds.items() if c != best}, 0.02, 4)
    with pytest.raises(ValueError, match="independent"):
        choose_verified(seconds, 0.02, 4, lambda c: False)


def test_the_choice_is_tried_on_this_machine(
    tiny_network: Callable[..., Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, settings = tiny_bundle(tiny_network), Settings(kv_memory_mib=1)
    threads = torch.get_num_threads()
    try:
        assert starts(bundle, settings, Candidate(1, 8))

        def refuse(*args: object) -> None:
            raise RowDependenceError

        monkeypatch.setattr("service.calibrate.agreeing_sizes", refuse)
        assert not starts(bundle, settings, Candidate(1, 8))
    finally:
        torch.set_num_threads(threads)
