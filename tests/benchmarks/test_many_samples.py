"""What the number of samples costs: by a clock worked out by hand, on sources that have what they say."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import many_samples
from madformer.data.images import ImageDataset


def test_the_least_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(time, "process_time", lambda: next(marks))
    assert many_samples.cpu_seconds(lambda: None, 3) == 2


def test_every_thousandth_is_damaged() -> None:
    data = ImageDataset(many_samples.OnePicture(3000), 8, on_error="skip", max_bad_fraction=1)
    assert [data[index]["key"] for index in (998, 999, 1999, 2999)] == ["998", "1000", "2000", "0"]
    assert data.num_bad == 3


def test_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    assert many_samples.main(["--counts", "4000,2000", "--files", "10", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert list(record["counts"]) == ["2000", "4000"]
    assert 38 < record["counts"]["4000"]["bytes_per_name"] < 41  # 31 characters, and 8 bytes that say where they end
    items = [record["counts"][count]["item_us"] for count in ("2000", "4000")]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"item_of_most_vs_fewest": items[1] / items[0]}


@pytest.mark.parametrize("arguments", [["--counts", "many"], ["--counts", "10"], ["--files", "0"]])
def test_refused_options(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        many_samples.main(arguments)
