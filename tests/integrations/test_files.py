"""Whatever a file holds, it is loaded right or refused in one line, soon, and before anything is built from it."""

import io
import json
import os
import random
import signal
import socket
import zipfile

import peers
import pytest
import torch
import transformers
from hosts import build
from safetensors.torch import save_file
from typer.testing import CliRunner

from retention import cli
from retention.integrations.checkpoints import load
from retention.integrations.files import read_json
from retention.integrations.swap import replace_attention
from retention.integrations.transformers import RetNetConfig, RetNetForCausalLM, load_swapped, remote

TINY = dict(vocab_size=20, dim=8, num_layers=2, num_heads=2, ffn_dim=8)


@pytest.fixture(autouse=True)
def soon():
    """A hang fails the test, and not the run of all tests."""

    def hangs(*_):
        raise BaseException("this hangs")  # which no handler of errors takes for one

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def weights(**options):
    made = peers.syncdoth_weights(vocab=20, dim=8, value_dim=8, ffn=8, layers=2, heads=2, **options)
    return {name: x.float() for name, x in made.items()}


def refused(path, message):
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000


# --- JSON -------------------------------------------------------------------------------------------------------------

JSON = {
    "empty": (b"", "is empty"),
    "half": (b'{"a": ', "must be JSON; Expecting value"),
    "text": (b"\xff\xfe{}", "must be JSON; 'utf-8' codec can't decode"),
    "list": (b"[1]", "must hold options by name, .*; got list"),
    "deep": (b'{"a":' + b"[" * 100_000, "nested deeper than 32"),
    "deep-but-parsed": (b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper than 32"),
    "nan": (b'{"a": NaN}', "must be finite; got NaN"),
    "infinity": (b'{"a": [-Infinity]}', "must be finite; got -Infinity"),
    "overflow": (b'{"a": 1e999}', "must be finite; got 1e999"),
    "long": (b'{"a": 1' + b"0" * 5000 + b"}", "integers must be at most 9223372036854775807; got 1000"),
    "64-bit": (b'{"a": 9223372036854775808}', "integers must be at most"),
    "twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' more than once"),
}


@pytest.mark.parametrize(("content", "message"), JSON.values(), ids=list(JSON))
def test_json_is_bounded_and_unambiguous(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json {message}|a\.json must be JSON; .*{message}") as error:
        read_json(tmp_path / "a.json")
    assert len(str(error.value)) < 500


def test_json_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**30)  # takes no room
    with pytest.raises(ValueError, match="must have at most 67,108,864 bytes"):
        read_json(tmp_path / "a.json")


# --- what is no file --------------------------------------------------------------------------------------------------


def pipe(path):
    os.mkfifo(path)


def bound_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # its name must be short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize(
    ("make", "kind"),
    [(pipe, "a pipe"), (bound_socket, "a socket"), (lambda path: path.mkdir(), "a folder")],
    ids=["pipe", "socket", "folder"],
)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json", "a.safetensors"]
)
def test_what_is_no_file_is_not_waited_for(name, make, kind, tmp_path):
    if name == "config.json":
        save_file(weights(), tmp_path / "model.safetensors")
    if name == "a.safetensors":
        index = {"weight_map": dict.fromkeys(weights(), name)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    make(tmp_path / name)
    refused(tmp_path, f"{name} must be a regular file, not {kind}")
    if kind != "a folder":
        refused(tmp_path / name, f"{name} must be a regular file, not {kind}")


def test_devices_and_links_that_lead_nowhere_are_refused(tmp_path):
    refused("/dev/zero", "must be a regular file, not a device")
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_empty_files_are_named(name, tmp_path):
    (tmp_path / name).touch()
    refused(tmp_path, f"{name} is empty")


# --- an index ---------------------------------------------------------------------------------------------------------

INDEX = {
    "list": ([], r"must hold a weight_map, tensors to files; got weight_map \[\]"),
    "nothing": ({}, "must hold a weight_map"),
    "number": ({"x": 3}, "must name files beside itself; got 3 for x"),
    "null": ({"x": None}, "must name files beside itself; got None for x"),
    "lists": ({"x": ["a"]}, "must name files beside itself; got .* for x"),
    "up": ({"x": "../model.safetensors"}, "must name files beside itself; got '../model.safetensors' for x"),
    "absolute": ({"x": "/etc/passwd"}, "must name files beside itself; got '/etc/passwd' for x"),
    "windows": ({"x": "..\\model.safetensors"}, "must name files beside itself"),
    "dots": ({"x": ".."}, "must name files beside itself"),
    "control": ({"x": "a\n\0b"}, "must name files beside itself"),
    "surrogate": ({"x": "\ud800"}, "must name files beside itself"),
    "absent": ({"x": "absent.safetensors"}, "names absent.safetensors, which is not there"),
    "more": ({"x": "a.safetensors"}, "must name the same tensors; only one of them has .* and 16 more"),
}


@pytest.mark.parametrize(("names", "message"), INDEX.values(), ids=list(INDEX))
def test_an_index_names_files_beside_itself_and_all_that_is_in_them(names, message, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(weights(), tmp_path / "model.safetensors")
    save_file(weights(), folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(folder, message)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file(weights(), tmp_path / name)
    names = list(weights())
    index = {"weight_map": dict.fromkeys(names[::2], "a.safetensors") | dict.fromkeys(names[1::2], "b.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "must name the same tensors; only one of them has")


def test_one_whole_file_counts_more_than_an_index_as_in_transformers(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "left-over.safetensors"}}')
    assert load(tmp_path).config.num_layers == 2


# --- contents ---------------------------------------------------------------------------------------------------------


def own_reference():
    whole = dict(weights())
    whole["model"] = whole
    return whole


def wrapped(times):
    whole = weights()
    for _ in range(times):
        whole = {"model": whole}
    return whole


def at(value, key="model.layers.0.retention.q_proj.weight"):
    return lambda: weights() | {key: value}


def nan_at(position):
    def spoilt():
        whole = weights()
        whole["model.layers.1.ffn.fc2.weight"].view(-1)[position] = torch.nan
        return whole

    return spoilt


def quantised():
    return weights() | {"x": torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.qint8)}


CONTENTS = {
    "own-reference": (own_reference, r"got model \(dict\)"),
    "wrapped": (lambda: wrapped(20), r"got model \(dict\)"),
    "integer-keys": (lambda: {3: torch.ones(2)}, r"got 3 \(a name of type int\)"),
    "mixed-keys": (at(torch.ones(2), 3), r"got 3 \(a name of type int\)"),
    "tuple-keys": (at(torch.ones(2), ("a", 1)), r"a name of type tuple"),
    "line-break": (at(torch.ones(2), "a\nb"), "unknown tensors: a b"),
    "fp8": (
        at(torch.ones(8, 8).to(torch.float8_e4m3fn)),
        r"q_proj\.weight \(float8_e4m3fn\); .*of float16, bfloat16|UntypedStorage",
    ),
    "fp8-scale": (at(torch.ones(8).to(torch.float8_e8m0fnu)), r"\(float8_e8m0fnu\)|UntypedStorage"),
    "complex": (at(torch.ones(8, 8, dtype=torch.complex64)), r"\(complex64\)"),
    "bool": (at(torch.ones(8, 8, dtype=torch.bool)), r"\(bool\)"),
    "sparse": (at(torch.eye(8).to_sparse()), r"\(sparse_coo\)"),
    "quantised": (quantised, r"\(qint8\)"),
    "scalar": (at(torch.tensor(1.0)), r"\(of shape \(\)\)"),
    "no-values": (at(torch.ones(0, 8)), r"\(of shape \(0, 8\)\)"),
    "meta": (at(torch.ones(8, 8, device="meta")), r"\(without values, on meta\)"),
    "expanded": (at(torch.ones(1).expand(10**6, 10**6)), r"\(1000000000000 values of fewer that are stored\)"),
    "list": (lambda: [torch.ones(2)], "must hold a state dict; got list"),
    "tensor": (lambda: torch.ones(2), "must hold a state dict; got Tensor"),
    "nan-first": (nan_at(0), r"must hold finite values; it has NaN or infinity in model\.layers\.1\.ffn\.fc2\.weight"),
    "nan-last": (nan_at(-1), "must hold finite values"),
    "infinity": (at(torch.full((8, 8), -torch.inf)), "must hold finite values"),
    "half-infinity": (at(torch.full((8, 8), torch.inf).half()), "must hold finite values"),
    "layers": (
        at(torch.ones(8), "model.layers.999999999999.retention_layer_norm.weight"),
        r"there is a backbone\.blocks\.999999999999 but no backbone\.blocks\.2",
    ),
    "decays": (at(-torch.ones(10**6), "model.retnet_rel_pos.decay"), r"log_decays must have at most dim 8 values"),
    "experts": (
        at(torch.ones(10**6, 8), "model.layers.1.moe_layer.gate.wg.weight"),
        "one row for each expert; in block 1 it has 1000000, for 0 experts",
    ),
    "dimensions": (at(torch.ones(2, 2, 2)), r"one or two dimensions; got .*q_proj\.weight \(2, 2, 2\)"),
    "mixed-dtypes": (at(torch.ones(20, 8).half(), "lm_head.weight"), None),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("make", "message"), CONTENTS.values(), ids=list(CONTENTS))
def test_what_is_no_weight_is_named(make, message, legacy, tmp_path):
    torch.save(make(), tmp_path / "in.pt", _use_new_zipfile_serialization=not legacy)
    if message is None:
        assert not load(tmp_path / "in.pt").config.tie_word_embeddings
    else:
        refused(tmp_path / "in.pt", message)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_refused(layout, tmp_path):
    nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=layout)
    torch.save(weights() | {"x": nested}, tmp_path / "in.pt")
    refused(tmp_path / "in.pt", r"x \((nested|NestedTensor)\)|runs code when it is loaded")


@pytest.mark.parametrize(
    "shape", [("W_Q", (3,)), ("W_O", (5,)), ("W_V", (2, 2, 2, 2))], ids=lambda x: x if isinstance(x, str) else str(x)
)
def test_matrices_of_jamie_stirling_of_another_rank_are_refused(shape, tmp_path):
    whole = peers.jamie_stirling_weights(dim=8, value_dim=8, ffn=8, layers=1, heads=2, stacked=True)
    name = next(key for key in whole if key.endswith(shape[0]))
    save_file({key: x.clone() for key, x in whole.items()} | {name: torch.ones(shape[1])}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "must have two dimensions, or three with the heads")


def test_compressed_and_damaged_archives_are_refused(tmp_path):
    torch.save(weights(), tmp_path / "in.pt")
    whole = (tmp_path / "in.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        data = archive.getinfo("in/data/0")
        with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
            for name in archive.namelist():
                small.writestr(name, archive.read(name))
    refused(tmp_path / "small.pt", "its content is compressed")
    changed = bytearray(whole)
    changed[whole.index(b"PK", data.header_offset + 4) - 9] ^= 1  # in the last value of the first tensor
    (tmp_path / "in.pt").write_bytes(changed)
    refused(tmp_path / "in.pt", "in/data/0 inside is damaged")


def test_archives_without_checksums_load(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights(), tmp_path / "in.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load(tmp_path / "in.pt").config.num_layers == 2


# --- a config ---------------------------------------------------------------------------------------------------------

CONFIGS = [
    ({"num_layers": 10**12}, "num_layers must be an integer from 1 to 10,000; got num_layers 1000000000000"),
    ({"num_hidden_layers": 10**12, "num_layers": 2}, "num_layers"),
    ({"num_layers": -1}, "num_layers must be an integer from 1"),
    ({"num_layers": True}, "num_layers must be an integer"),
    ({"num_layers": "2"}, "num_layers must be an integer .*; got num_layers '2'"),
    ({"num_layers": 2.0}, "num_layers must be an integer"),
    ({"num_heads": 10**6}, "num_heads must be an integer from 1 to 10,000"),
    ({"dim": 10**12}, "dim must be an integer from 1 to 16,777,216"),
    ({"dim": -4}, "dim must be an integer from 1"),
    ({"vocab_size": -5}, "vocab_size must be an integer from 0"),
    ({"moe_every": 1, "moe_num_experts": 10**9}, "moe_num_experts must be an integer from 0 to 10,000"),
    ({"num_labels": 10**9}, "num_labels must be an integer from 0"),
    ({"decoder_value_embed_dim": 10**12}, "decoder_value_embed_dim must be an integer from 1"),
    ({"retention": {"value_dim": 10**13}}, "value_dim must be an integer from 1 to 16,777,216"),
    ({"retention": {"chunk_size": 0}}, "chunk_size must be an integer from 1"),
    ({"retention": {"gama": 1}}, "options that no RetNet has: gama; correct or remove them"),
    ({"retention": [1]}, r"retention must hold options of the layer, by name; got retention \[1\]"),
    ({"dtype": "nonsense"}, "no attribute 'nonsense'"),
    ({"id2label": 5}, "the config makes no RetNet"),
    ({"head_dim": 3}, "head_dim follow from the other options"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "message"), CONFIGS, ids=str)
def test_no_config_in_a_file_asks_for_what_cannot_be_built(options, message, tmp_path):
    RetNetForCausalLM(RetNetConfig(**TINY)).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(whole | options))
    refused(tmp_path, message)
    for read in (RetNetConfig, transformers.AutoConfig, RetNetForCausalLM):
        with pytest.raises(ValueError, match=message):
            read.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [JSON["deep"], JSON["twice"], JSON["nan"], JSON["empty"]], ids=lambda x: str(x[1]))
def test_every_door_to_a_config_reads_json_alike(content, tmp_path):
    model = build("Llama")
    replace_attention(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content[0])
    for read in (RetNetConfig.from_pretrained, load_swapped):
        with pytest.raises(ValueError, match=content[1]):
            read(tmp_path)


def test_the_code_in_a_folder_opens_configs_of_ours_alone(tmp_path):
    for content, message in (
        (b'{"model_type": ["llama"]}', r"model_type must be retention or retention_in_attention, .*; got \['llama'\]"),
        JSON["deep"],
    ):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            remote.Config.from_pretrained(tmp_path)


def replaced(options):
    return {"retention_layers": {"layers.0.self_attn": options}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retention_layers": [1]}, r"must have 'retention_layers', a dict; got \[1\]"),
        ({"attention_config": None}, "must have 'attention_config', a dict; got None"),
        ({"attention_model_type": ["llama"]}, "must have 'attention_model_type', a str"),
        ({"attention_model_type": "none"}, "must be one that the installed transformers has; got 'none'"),
        ({"attention_config": {"num_hidden_layers": 10**12}}, "num_hidden_layers must be at most 10,000"),
        ({"attention_config": {"num_hidden_layers": "x"}}, "attention_config has an option that no llama has"),
        (replaced(3), "must have 'layers.0.self_attn', a dict; got 3"),
        (replaced({"gama": 1}), "layers.0.self_attn has options that no replaced layer has: gama; correct or remove"),
        (replaced({"where": "x"}), "layers.0.self_attn has options that no replaced layer has: where"),
        (
            replaced({"num_decays": 10**12}),
            "num_decays of layers.0.self_attn must be at most 10,000; got 1000000000000",
        ),
        (replaced({"window": "x"}), "options for layers.0.self_attn that cannot be: window must be"),
        (replaced({"decay": [1] * 9}), "options for layers.0.self_attn that cannot be: decay must hold"),
        (replaced({"decay": 3}), "options for layers.0.self_attn that cannot be: decay must be"),
    ],
    ids=str,
)
def test_the_config_of_a_model_with_replaced_layers_is_checked(options, message, tmp_path):
    model = build("Llama")
    replace_attention(model)
    model.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(whole | options))
    for read in (load_swapped, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_command_refuses_in_one_line(tmp_path):
    torch.save(own_reference(), tmp_path / "in.pt")
    pipe(tmp_path / "pipe")
    save_file(weights(), tmp_path / "a.safetensors")
    for words in (
        [tmp_path / "in.pt"],
        [tmp_path / "pipe"],
        [tmp_path / "a.safetensors", "--config", tmp_path / "pipe"],
    ):
        result = command("convert", *words, "--", tmp_path / "out")
        assert result.exit_code == 2
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_generate_reads_no_ids_of_tokens_as_bytes(tmp_path):
    RetNetForCausalLM(RetNetConfig(**TINY | {"vocab_size": 257})).save_pretrained(tmp_path)
    result = command("generate", "--model", tmp_path)
    assert result.exit_code == 2
    assert "must hold the model's tokenizer, for it knows 257 tokens" in result.output
    RetNetForCausalLM(RetNetConfig(**TINY | {"vocab_size": 256})).save_pretrained(tmp_path / "bytes")
    assert command("generate", "--model", tmp_path / "bytes", "--tokens", 3, "--device", "cpu").exit_code == 0


def test_generate_does_not_draw_weights_that_are_missing(tmp_path):
    model = RetNetForCausalLM(RetNetConfig(**TINY | {"vocab_size": 256}))
    model.save_pretrained(tmp_path)
    whole = {name: x for name, x in model.state_dict().items() if "fc2" not in name and name != "lm_head.weight"}
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    result = command("generate", "--model", tmp_path, "--device", "cpu")
    assert result.exit_code == 2
    assert "missing: model.backbone.blocks.0.ffn.fc2.weight" in result.output


# --- anything ---------------------------------------------------------------------------------------------------------


def damaged(content, chance):
    """A file with some bytes cut, put in, taken from elsewhere in it or changed."""
    some, place = bytearray(content), chance.randrange(len(content))
    count = chance.choice([1, 1, 1, 2, 8, 30])
    kind = chance.randrange(6)
    if kind == 0:
        del some[place:]
    elif kind == 1:
        del some[place : place + count]
    elif kind == 2:
        some[place:place] = chance.randbytes(count)
    elif kind == 3:
        other = chance.randrange(len(some))
        some[place : place + count] = some[other : other + count]
    else:  # the first bytes say how the rest is read
        for _ in range(count):
            some[chance.randrange(len(some) if kind == 4 else min(len(some), 2000))] ^= 1 << chance.randrange(8)
    return bytes(some)


def damaged_pickle(content, chance):
    """A whole archive of torch with a damaged description of its tensors."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(made, "w") as archive:
        for name in whole.namelist():
            part = whole.read(name)
            archive.writestr(name, damaged(part, chance) if name.endswith("data.pkl") else part)
    return made.getvalue()


VALUES = ["null", "true", "-1", "0", "1e999", "NaN", "1" + "0" * 12, "1" + "0" * 400, '"x"', "[]", "{}", "[[1]]", "1.5"]
VALUES += ['"../a"', '"\\ud800"', "[" * 2000]


def damaged_json(content, chance):
    """With another value somewhere."""
    if chance.random() < 0.3:
        return damaged(content, chance)
    whole = json.loads(content)
    inner = [whole, *(value for value in whole.values() if isinstance(value, dict) and value)]
    place = chance.choice(inner)
    place[chance.choice([*place, "other"])] = "here"
    return json.dumps(whole).replace('"here"', chance.choice(VALUES), 1).encode()


def made(kind, folder):
    """A file of a kind that is loaded, and the function that damages it."""
    if kind == "safetensors":
        save_file(weights(), folder / "in.safetensors")
        return folder / "in.safetensors", damaged
    if kind in ("zip", "pickle", "legacy"):
        torch.save(weights(), folder / "in.pt", _use_new_zipfile_serialization=kind != "legacy")
        return folder / "in.pt", damaged_pickle if kind == "pickle" else damaged
    config = RetNetConfig(**TINY, tie_word_embeddings=False, retention={"value_dim": 16, "decay": "short"})
    RetNetForCausalLM(config).save_pretrained(folder, max_shard_size="1kB" if kind == "index" else "1GB")
    return folder / ("config.json" if kind == "config" else "model.safetensors.index.json"), damaged_json


def check_damaged(kind, folder, seeds):
    """Every damaged file is loaded or refused; what has checksums is loaded as it was."""
    file, damage = made(kind, folder)
    whole = file.read_bytes()
    source = folder if file.suffix == ".json" else file
    want = load(source).state_dict()
    for seed in seeds:
        file.write_bytes(damage(whole, random.Random(f"{kind} {seed}")))
        said = ""
        try:
            got = load(source).state_dict()
        except ValueError as error:
            said = str(error)
        assert "\n" not in said, seed
        if not said:
            assert kind != "zip" or all(torch.equal(x, want[name]) for name, x in got.items()), seed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle", "legacy", "config", "index"])
def test_damaged_files_are_loaded_or_refused(kind, tmp_path):
    check_damaged(kind, tmp_path, range(40))
