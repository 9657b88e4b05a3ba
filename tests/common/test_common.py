"""Our classes in the tests that every model of transformers has to pass."""

import importlib
import unittest

import torch
import transformers
from hosts import SIZES as LARGE
from transformers.models.auto import modeling_auto as auto

from retention.integrations.swap import replace_attention
from retention.integrations.transformers import (
    RetNetConfig,
    RetNetForCausalLM,
    RetNetForSequenceClassification,
    RetNetForTokenClassification,
    RetNetModel,
)

modeling = importlib.import_module("transformers_tests.test_modeling_common")
configuration = importlib.import_module("transformers_tests.test_configuration_common")
executorch = importlib.import_module("transformers_tests.test_executorch")
training = importlib.import_module("transformers_tests.test_training_mixin")

# transformers' tests know a model's task by the lists of its own classes.
auto.MODEL_MAPPING_NAMES["retention"] = "RetNetModel"
auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["retention"] = "RetNetForCausalLM"
auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["retention"] = "RetNetForSequenceClassification"
auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["retention"] = "RetNetForTokenClassification"
SIZES = {name: size for name, size in LARGE.items() if name != "initializer_range"}

# What fails, and why; with "until" in transformers before that version only. An entry that passes fails the run.
FAILURES = [
    {
        "test": "RetNetExportTest::test_hybrid_cache_module_forward",
        "reason": "it makes the layers attention with a window, and RetNet's are of one kind",
    },
]


def replaced(host):
    """The class `host` with retention in its attention from the first, also when it is loaded."""

    class Replaced(host):
        def __init__(self, config):
            super().__init__(config)
            replace_attention(self, allow_lost=True)

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
            """By AutoConfig, since the file of a model with replaced layers is not one of its host's config."""
            folder = pretrained_model_name_or_path
            if config is None and folder is not None:
                config = transformers.AutoConfig.from_pretrained(folder)
                for name in {"num_labels", "vocab_size"} & set(kwargs):
                    setattr(config, name, kwargs.pop(name))
            return super().from_pretrained(folder, *args, config=config, **kwargs)

    Replaced.__name__ = host.__name__  # transformers goes by names
    return Replaced


class Tester:
    """What transformers' tests ask of a model: a small config, and a batch with padding."""

    is_training = True
    batch_size, seq_length = 4, 7
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4

    def __init__(self, case):
        self.get_config = case.make_config
        self.base_model_class, self.causal_lm_class = case.all_model_classes[:2]

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Common(modeling.ModelTesterMixin, training.TrainingTesterMixin, modeling.GenerationTesterMixin):
    has_attentions = False
    model_tester = None

    def setUp(self):
        self.model_tester = Tester(self)


class RetNetTest(Common, unittest.TestCase):
    all_model_classes = (
        RetNetModel,
        RetNetForCausalLM,
        RetNetForSequenceClassification,
        RetNetForTokenClassification,
    )
    _torch_compile_train_cls = RetNetForCausalLM

    @staticmethod
    def make_config():
        return RetNetConfig(vocab_size=99, dim=32, num_layers=2, num_heads=4, pad_token_id=0, num_labels=3)

    def test_config(self):
        configuration.ConfigTester(self, RetNetConfig, dim=40, num_heads=4).run_common_tests()


class ReplacedLlamaTest(Common, unittest.TestCase):
    all_model_classes = tuple(
        replaced(getattr(transformers, f"Llama{head}"))
        for head in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
    )

    @staticmethod
    def make_config():
        return transformers.LlamaConfig(**SIZES, num_key_value_heads=2, num_labels=3)


class ReplacedGPT2Test(Common, unittest.TestCase):
    all_model_classes = tuple(
        replaced(getattr(transformers, f"GPT2{head}"))
        for head in ("Model", "LMHeadModel", "ForSequenceClassification", "ForTokenClassification")
    )

    @staticmethod
    def make_config():
        return transformers.GPT2Config(**SIZES, num_labels=3)


class RetNetExportTest(executorch.ExecutorchTest):
    def setUp(self):
        transformers.set_seed(42)
        self.model = RetNetForCausalLM(RetNetTest.make_config()).eval()
        self.model.generation_config = transformers.GenerationConfig(
            use_cache=True,
            cache_implementation="static",
            cache_config={"batch_size": 1, "max_cache_len": 32, "device": "cpu"},
        )
        self.input_ids = torch.tensor([[1, 2, 3]])
        self.inputs_embeds = torch.randn(1, 3, 32)
        self.cache_position = torch.arange(3)
