from pathlib import Path

import pytest
import torch

from dit_sparse.pipelines.load import load_pipeline
from tests import tiny


def test_a_saved_pipeline_is_loaded_ready_to_run(tmp_path: Path) -> None:
    pipe = tiny.wan()
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert type(loaded) is type(pipe)
    assert loaded.transformer_2 is None
    assert loaded._progress_bar_config == {"disable": True}
    # Loaded weights are aligned differently, which moves matrix products by a few ulps.
    torch.testing.assert_close(tiny.generate(loaded), tiny.generate(pipe), rtol=0, atol=1e-4)
    assert load_pipeline(str(tmp_path), torch.bfloat16).vae.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/deep/down", "is no folder, nor found on the Hub: "),
        ("empty", "expected a folder with a model_index.json"),
        ("broken", "broken cannot be loaded: "),
    ],
)
def test_what_is_no_pipeline_is_refused_in_one_line(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=message) as raised:
        load_pipeline(tmp_path / name)
    assert "\n" not in str(raised.value)
