"""The configuration tree: presets, plain values there and back, and what is refused."""

import dataclasses
import json

import pytest

from osprey_jax.config import (
    PRESETS,
    DecoderConfig,
    OspreyConfig,
    VisionConfig,
    from_config,
    osprey_7b,
    preset,
    tiny,
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = preset(name)
    assert from_config(json.loads(json.dumps(config.to_dict()))) == config


def test_the_release_is_the_default_and_has_the_paper_s_sizes() -> None:
    config = osprey_7b()
    assert config == OspreyConfig() == from_config({})
    assert config.vision.level_sizes == (128, 64, 32, 16)
    assert config.vision.num_image_tokens == 1024
    assert (config.mask_token_id, config.position_token_id) == (32000, 32001)
    assert (config.decoder.rope_theta, config.decoder.norm_eps) == (10000.0, 1e-5)


def test_sizes_of_the_levels_follow_the_image() -> None:
    assert tiny().vision.level_sizes == (24, 12, 6, 3)
    assert tiny().vision.num_image_tokens == 36


def test_missing_keys_take_their_defaults_and_lists_become_tuples() -> None:
    config = from_config({"vision": {"depths": [1, 2, 3, 4]}, "decoder": {"rope_theta": 500000}})
    assert config.vision == VisionConfig(depths=(1, 2, 3, 4))
    assert isinstance(config.decoder.rope_theta, float)
    assert dataclasses.replace(config.decoder, rope_theta=1e4) == DecoderConfig()
    assert hash(config) == hash(from_config(config.to_dict()))


def test_every_unknown_key_is_named_by_its_path() -> None:
    values = {"vision": {"depth": [1], "dims": [1, 2, 3, 4]}, "decoder": {"heads": 3}, "optimizer": {}}
    with pytest.raises(ValueError, match=r"unknown config keys: decoder\.heads, optimizer, vision\.depth$"):
        from_config(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder": 3}, "decoder must be a mapping, got 3"),
        ({"decoder": {"dim": "4096"}}, r"decoder\.dim must be an integer, got '4096'"),
        ({"decoder": {"dim": 40.0}}, r"decoder\.dim must be an integer, got 40\.0"),
        ({"decoder": {"dim": True}}, r"decoder\.dim must be an integer, got True"),
        ({"decoder": {"norm_eps": "1e-5"}}, r"decoder\.norm_eps must be a number, got '1e-5'"),
        ({"vision": {"depths": 3}}, r"vision\.depths must be a list of integers, got 3"),
        ({"vision": {"dims": [1, 2, 3.5, 4]}}, r"vision\.dims must be a list of integers"),
        ({"vision": {"depths": [1, 2, 3]}}, r"four stages each, got \(1, 2, 3\)"),
        ({"vision": {"image_size": 500}}, "image_size must be a multiple of 32, got 500"),
        ({"vision": {"image_size": 0}}, "image_size must be positive, got 0"),
        ({"vision": {"depths": [3, 0, 3, 3]}}, r"depths must be positive, got \(3, 0, 3, 3\)"),
        ({"vision": {"dims": [192, 384, 768, -1]}}, r"dims must be positive, got \(192, 384, 768, -1\)"),
        ({"extractor": {"position_size": 0}}, "position_size must be positive, got 0"),
        ({"decoder": {"num_kv_heads": 0}}, "num_kv_heads must be positive, got 0"),
        ({"decoder": {"num_kv_heads": -2}}, "num_kv_heads must be positive, got -2"),
        ({"decoder": {"norm_eps": float("nan")}}, "norm_eps must be positive, got nan"),
        ({"decoder": {"num_kv_heads": 5}}, r"num_heads \(32\) must be a multiple of num_kv_heads \(5\)"),
        ({"decoder": {"head_dim": 7}}, "head_dim must be even for rotary embeddings, got 7"),
    ],
)
def test_wrong_values_are_refused_with_their_path(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_config(values)


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="no preset 'osprey_13b'; choose one of osprey_7b, tiny"):
        preset("osprey_13b")
