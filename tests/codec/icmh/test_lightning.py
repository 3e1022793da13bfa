"""Checkpoints of other programs: what is read, and that nothing in them ever runs."""

import argparse
import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dicmh_ray.codec.icmh.inert_pickle import Inert, InertPickleError, Name, read_inert
from dicmh_ray.codec.icmh.lightning import open_weights
from dicmh_ray.errors import WeightsError

STATE = {
    "model.a.weight": torch.arange(12.0).reshape(3, 4),
    "model.half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "model.brain": torch.tensor([[3.0]], dtype=torch.bfloat16),
    "model.count": torch.tensor(7),
    "model.empty": torch.zeros(0, dtype=torch.int32),
    "model.turned": torch.arange(6.0).reshape(2, 3).T,
    "model.slice": torch.arange(10.0)[3:7],
}


class ModelCheckpoint:
    """Stands for Lightning's class, by whose name old versions key the states of callbacks."""


@pytest.fixture
def callback(monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(
        sys.modules, "pytorch_lightning.callbacks", types.ModuleType("pytorch_lightning.callbacks")
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(ModelCheckpoint, "__module__", module.__name__)
    module.ModelCheckpoint = ModelCheckpoint
    return ModelCheckpoint


def lightning(state, **more):
    optimizer = {
        "state": {0: {"step": 3, "exp_avg": torch.ones(2)}},
        "param_groups": [{"betas": (0.9, 0.999), "params": [0]}],
    }
    return {
        "epoch": 2,
        "global_step": 5000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(state),
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
        **more,
    }


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def zipped(path, content, members=None):
    """A zip like torch's around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in (members or {}).items():
            archive.writestr(f"archive/{name}", data)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_tensor_of_a_lightning_checkpoint_is_read_as_it_was(tmp_path, protocol, callback):
    content = lightning(
        STATE,
        callbacks={callback: {"best_model_score": torch.tensor(0.5), "dirpath": "runs"}},
        hyper_parameters=argparse.Namespace(seed=231, betas=[0.9, 0.99]),
        score=np.float64(0.25),
        numbers=np.arange(3),
        names={"a", "b"},
        where=Path("runs"),
    )
    file = open_weights(saved(tmp_path / "model.ckpt", content, pickle_protocol=protocol))
    assert list(file.tensors) == list(STATE)
    assert "optimizer_states" in file.ignored
    assert "state_dict" not in file.ignored
    for key, tensor in STATE.items():
        assert file.tensors[key] == (tuple(tensor.shape), tensor.dtype)
        found = file.tensor(key)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_a_bare_state_dict_with_version_notes_and_parameters_is_read(tmp_path):
    module = torch.nn.Conv2d(2, 3, 1)
    state = {**module.state_dict(), "as_parameter": module.weight}
    file = open_weights(saved(tmp_path / "bare.ckpt", state))
    assert file.ignored == ()
    assert torch.equal(file.tensor("as_parameter"), module.weight)
    noted = saved(tmp_path / "noted.ckpt", module.state_dict())
    assert list(open_weights(noted).tensors) == ["weight", "bias"]


def test_safetensors_are_read_whatever_their_name(tmp_path):
    state = {key: tensor.contiguous() for key, tensor in STATE.items()}
    save_file(state, tmp_path / "weights.ckpt")
    file = open_weights(tmp_path / "weights.ckpt")
    assert set(file.tensors) == set(state)
    for key, tensor in state.items():
        assert file.tensors[key] == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(file.tensor(key), tensor)


@pytest.mark.parametrize("first", [0x80, 0x50, 0x00])
def test_safetensors_whose_header_length_begins_like_a_pickle_are_read(tmp_path, first):
    path = tmp_path / "a.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    size = first if first >= len(header) else 256 + first
    path.write_bytes(size.to_bytes(8, "little") + header.ljust(size) + struct.pack("<f", 2.0))
    assert open_weights(path).tensor("a").item() == 2.0


def test_what_is_not_asked_for_is_not_read(tmp_path):
    content = lightning(STATE)
    content["optimizer_states"][0]["state"][0]["exp_avg"] = torch.full([4096], 1.25)
    path = saved(tmp_path / "model.ckpt", content)
    data = path.read_bytes().replace(struct.pack("<f", 1.25) * 64, bytes(256))
    path.write_bytes(data)
    assert torch.equal(open_weights(path).tensor("model.a.weight"), STATE["model.a.weight"])


class Payload:
    """Pickles as a call of ``os.system``."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["state_dict", "callbacks", "key"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_payload_is_refused_by_its_name_and_does_not_run(tmp_path, place, protocol):
    trace = tmp_path / "trace"
    payload = Payload(f"touch {trace}")
    state = {**STATE, "model.more": payload} if place == "state_dict" else STATE
    more = {"callbacks": payload} if place == "callbacks" else {}
    content = lightning(state, **more)
    if place == "key":
        content["optimizer_states"] = [{"state": [payload]}]
    path = saved(tmp_path / "model.ckpt", content, pickle_protocol=protocol)
    with pytest.raises(WeightsError, match=r"names (posix|os)\.system.*nothing of it was run"):
        open_weights(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the payload is live
    assert trace.exists()


ATTACKS = {
    "global": b"cos\nsystem\n.",
    "inst": b"(S'true'\nios\nsystem\n.",
    "obj": b"(cbuiltins\nset\nS'true'\no.",
    "reduce": b"cbuiltins\neval\n(S'1'\ntR.",
    "module": b"cantigravity\nx\n.",
    "dotted": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    "numpy": b"cnumpy.testing._private.utils\nrunstring\n.",
    "torch": b"ctorch.hub\nload\n.",
    "extension": b"\x82\x01.",
    "persistent": b"Pstorage\n.",
    "stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "newobj_ex": b"\x80\x04cbuiltins\nset\n)}\x92.",
    "call a text": b"S'os.system'\n)R.",
    "call a callback": b"cpytorch_lightning.callbacks.base\nCallback\n)R.",
    "attributes of a name": b"cbuiltins\nset\n}b.",
    "nested key": b"}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "nested storage type": b"X\x07\0\0\0storage)" + b"\x85" * 100_000 + b"X\1\0\0\0aNK\1tQ.",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_pickles_that_do_what_checkpoints_do_not_are_refused(tmp_path, attack):
    with pytest.raises(InertPickleError):
        read_inert(attack)
    with pytest.raises(WeightsError, match="refused: "):
        open_weights(zipped(tmp_path / "model.ckpt", attack))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_whatever_are_an_object_or_a_refusal(content):
    try:
        read_inert(content)
    except InertPickleError:
        return


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_an_object_or_a_refusal(data):
    content = bytearray(PICKLED)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_inert(bytes(content))
    except InertPickleError:
        return


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(plain, st.integers(0, 5))
def test_plain_data_is_read_as_unpickling_would(value, protocol):
    assert read_inert(pickle.dumps(value, protocol)) == value


def test_containers_that_hold_themselves_end():
    loop = []
    loop.append(loop)
    found = read_inert(pickle.dumps(loop))
    assert found[0] is found


def test_known_classes_become_placeholders_that_swallow_their_state():
    found = read_inert(pickle.dumps(argparse.Namespace(x=[1])))
    assert found == Inert(Name("argparse", "Namespace"))


def _pickled():
    file = io.BytesIO()
    torch.save(lightning(STATE), file)
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)


PICKLED = _pickled()


@pytest.fixture
def checkpoint(tmp_path):
    return saved(tmp_path / "model.ckpt", lightning(STATE))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_zip_is_refused(checkpoint, share):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(WeightsError, match=r"model.ckpt: truncated or damaged"):
        open_weights(checkpoint)


def test_a_zip_with_its_middle_cut_out_is_refused(checkpoint):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[:200] + data[900:])
    with pytest.raises(WeightsError):
        [file.tensor(key) for file in [open_weights(checkpoint)] for key in file.tensors]


def test_a_flipped_bit_in_a_tensor_is_found_when_it_is_read(checkpoint):
    data = bytearray(checkpoint.read_bytes())
    data[bytes(data).index(STATE["model.a.weight"].numpy().tobytes()) + 5] ^= 4
    checkpoint.write_bytes(data)
    file = open_weights(checkpoint)
    assert torch.equal(file.tensor("model.half"), STATE["model.half"])
    with pytest.raises(WeightsError, match=r"data/\d+ is damaged: CRC-32"):
        file.tensor("model.a.weight")


def test_the_old_format_is_refused_with_the_way_out(tmp_path):
    path = saved(tmp_path / "old.ckpt", STATE, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"before 1.6.*save it again"):
        open_weights(path)


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\0" * 64, b"PK\x05\x06" + bytes(18)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="neither a torch zip nor safetensors"):
        open_weights(path)


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="truncated or damaged safetensors"):
        open_weights(path)


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.jpg", b"")
    with pytest.raises(WeightsError, match=r"0 data.pkl"):
        open_weights(path)


def test_compressed_members_are_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000))
    with pytest.raises(WeightsError, match="compressed"):
        open_weights(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(tmp_path):
    path = zipped(tmp_path / "two.ckpt", b"}.", {"data.pkl": b"}."})
    with pytest.raises(WeightsError, match="two members"):
        open_weights(path)


@pytest.mark.parametrize("content", [{"state_dict": [1]}, {"state_dict": {"a": 1}}, [1], {"a": {}}])
def test_a_checkpoint_without_tensors_is_refused(tmp_path, content):
    with pytest.raises(WeightsError, match=r"no dictionary of tensors|is no tensor"):
        open_weights(saved(tmp_path / "model.ckpt", content))


def tensor_pickle(length, offset, shape, strides):
    """A state dict with one float32 tensor in storage ``data/0``."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return "storage", torch.FloatStorage, "0", "cpu", length
            return None

    class Tensor:
        def __reduce__(self):
            arguments = (Storage(), offset, shape, strides, False, {})
            return torch._utils._rebuild_tensor_v2, arguments

    file = io.BytesIO()
    Pickler(file, 2).dump({"a": Tensor()})
    return file.getvalue()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (5,), (1,)), (4, (1,), (1,)), (0, (2, 2), (3, 1)), (-1, (1,), (1,)), (0, (-1,), (1,))],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, offset, shape, strides):
    content = tensor_pickle(4, offset, shape, strides)
    path = zipped(tmp_path / "model.ckpt", content, {"data/0": bytes(16)})
    with pytest.raises(WeightsError, match="refused: damaged pickle"):
        open_weights(path)


@pytest.mark.parametrize(("members", "found"), [({}, "missing"), ({"data/0": bytes(12)}, "12")])
def test_a_storage_that_is_missing_or_short_is_refused(tmp_path, members, found):
    path = zipped(tmp_path / "model.ckpt", tensor_pickle(4, 0, (4,), (1,)), members)
    with pytest.raises(WeightsError, match=f"storage data/0 of 'a' is {found}.*wanted 16 bytes"):
        open_weights(path).tensor("a")


def test_a_storage_that_is_not_aligned_is_read(tmp_path):
    content = tensor_pickle(4, 0, (4,), (1,))
    data = np.arange(4, dtype=np.float32).tobytes()
    for pad in range(4):
        path = zipped(tmp_path / f"{pad}.ckpt", content + b"", {"x" * pad: b"", "data/0": data})
        assert open_weights(path).tensor("a").tolist() == [0, 1, 2, 3]


def test_big_endian_tensors_are_refused(tmp_path):
    path = zipped(tmp_path / "model.ckpt", b"}.", {"byteorder": b"big"})
    with pytest.raises(WeightsError, match="not little-endian"):
        open_weights(path)


def test_a_pickle_of_a_size_that_no_checkpoint_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dicmh_ray.codec.icmh.lightning.MAX_PICKLE_BYTES", 100)
    with pytest.raises(WeightsError, match="at most 100 are read"):
        open_weights(saved(tmp_path / "model.ckpt", lightning(STATE)))
