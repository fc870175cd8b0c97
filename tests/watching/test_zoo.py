"""The table in docs/models.md is what the sweep finds now, for a sample over all families and ways."""

from pathlib import Path

import pytest

from tests.watching.zoo.catalog import ZOO
from tests.watching.zoo.sweep import Row, examine, page, read_table

PAGE = (Path(__file__).parent.parent.parent / "docs" / "models.md").read_text("utf-8")
TABLE = read_table(PAGE)
_NAMES = """
    aimv2_vision_model albert bart bert blip_2_qformer bloom deberta deepseek_v3 falcon gemma2 gpt2 gpt_oss granite_swa
    inkling2 llama minimax mistral nemotron_asr_streaming_encoder qwen2_vl reformer siglip2_vision_model
    siglip_vision_model swin t5 vit wav2vec2 wavlm whisper xlnet
"""
SAMPLE = _NAMES.split()


def test_table_lists_every_type_once() -> None:
    assert set(TABLE) == set(ZOO)
    assert sum(line.startswith("| ") for line in PAGE.splitlines()) == len(ZOO) + 1


def test_totals_are_those_of_the_table() -> None:
    recorded = [row for row in TABLE.values() if row[-1].startswith("recorded")]
    part = [row for row in recorded if "in part" in row[-1]]
    assert f"Of {len(TABLE)} types **{len(recorded)} are recorded** ({len(part)} of them in part)" in PAGE
    assert all(row[-1].startswith(("recorded", "refused", "not seen")) for row in TABLE.values())


@pytest.mark.parametrize("name", SAMPLE)
def test_type_is_as_the_table_says(name: str) -> None:
    row = examine(name)
    assert row.fixed() == TABLE[name]
    assert row.clean or not row.sites


def test_sample_covers_every_family_and_every_kind_of_row() -> None:
    assert {TABLE[name][1] for name in SAMPLE} == {row[1] for row in TABLE.values()}
    assert {TABLE[name][4] for name in SAMPLE} == {row[4] for row in TABLE.values()}
    assert {TABLE[name][-1].split(":")[0].split(";")[0] for name in SAMPLE} == {
        row[-1].split(":")[0].split(";")[0] for row in TABLE.values()
    }


def test_written_page_is_read_back() -> None:
    rows = [Row("llama", "decoder", 2, 2, 0, "huggingface", 1e-7, 2e-7, 3e-7, 2, True, "recorded")]
    assert read_table(page(rows)) == {"llama": rows[0].fixed()}
    assert "Of 1 types **1 are recorded** (0 of them in part), 0 are refused and 0 are not seen" in page(rows)
