"""Rendered scenes with conversations whose every word is true: data to learn from without a download."""

from data_pipelines.shapes.scene import Region, Scene
from data_pipelines.shapes.source import Shapes
from data_pipelines.shapes.tokenizer import train_tokenizer
from data_pipelines.shapes.words import short_description

__all__ = ["Region", "Scene", "Shapes", "short_description", "train_tokenizer"]
