"""The settings of a training run."""

import pytest

from retention.integrations.transformers.training import settings as settings_module
from retention.integrations.transformers.training import train as training
from retention.integrations.transformers.training.settings import Settings, read_config


def test_kept_settings_are_read_as_they_were_written(tmp_path):
    settings = Settings(files=["a"], config={"dim": 8}, lr=1, warmup=3, gradient_checkpointing=True)
    settings.write(tmp_path)
    assert Settings.read(tmp_path) == settings


def test_the_experiment_tracker_is_the_users(settings, tmp_path, monkeypatch):
    assert training._arguments(settings, tmp_path).report_to == []
    monkeypatch.setattr(settings_module, "get_available_reporting_integrations", lambda: ["tensorboard"])
    settings.report_to = "tensorboard"
    settings.check()
    assert training._arguments(settings, tmp_path).report_to == ["tensorboard"]


def test_configs_of_other_retnets_are_understood(tmp_path):
    (tmp_path / "config.json").write_text('{"decoder_embed_dim": 64, "use_lm_decay": true, "hidden_size": 64}')
    assert read_config(tmp_path)["use_lm_decay"]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json must be JSON; "):
        read_config(tmp_path)
