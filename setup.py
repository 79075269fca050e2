"""Packaging of osprey-jax; what lint, types and tests need to know is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "absl-py>=2.0",
    "array_record>=0.8",
    "etils[epath]>=1.10",
    "flax>=0.12",
    # The loader tells its own state apart from Grain's, whose classes move between minor versions.
    "grain>=0.2.18,<0.3",
    "huggingface_hub>=1.0",
    # Two minor versions that are known to work: Python 3.11 has 0.10, newer Pythons have 0.11.
    "jax>=0.10,<0.12",
    "jaxtyping>=0.3",
    "ml_collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.5",
    # The documented v1 interface still moves between minor versions.
    "orbax-checkpoint>=0.12,<0.13",
    "pillow>=11.0",
    "pycocotools>=2.0.8",
    "safetensors>=0.5",
    "scipy>=1.13",
    "sentencepiece>=0.2",
    "tensorboardX>=2.6",
    # Writes and reads ArrayRecord data sets without TensorFlow.
    "tensorflow-datasets>=4.9.10,<5",
    "tensorstore>=0.1.70",
    "tokenizers>=0.21",
    "tqdm>=4.66",
]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "gpu": ["jax[cuda12]"],
    # Reading and writing PyTorch's files; nothing else needs torch.
    "convert": ["torch>=2.6"],
    # A kernel to try the predictor in a notebook.
    "demo": ["ipykernel>=6.0"],
    "test": [
        # Lint, types and warnings that are errors change with these.
        "mypy>=2.4,<2.5",
        "pytest>=9.2,<10",
        "pytest-xdist>=3.8",
        "ruff>=0.17,<0.18",
        # Broken files without end.
        "hypothesis>=6.100",
        # What parity is measured against.
        "matplotlib>=3.9",
        "torch==2.13.0",
        "transformers>=5.24,<6",
        # Carries a real 32,000-piece SentencePiece model.
        "mistral-common>=1.8",
    ],
}

setup(
    name="osprey-jax",
    version="0.1.0",
    description="Osprey, a vision-language model that describes regions of images, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Naming the root makes an editable install follow packages that are added later.
    package_dir={"": "."},
    packages=find_packages(include=["osprey_jax*", "data_pipelines*", "configs*"]),
    package_data={"osprey_jax.label": ["gallery.html"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "osprey-convert = osprey_jax.convert:main",
            "osprey-describe = osprey_jax.describe:main",
            "osprey-label = osprey_jax.label.command:main",
        ]
    },
)
