"""Packaging; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

TOOLS = ["bm25s>=0.3", "jsonschema>=4.23"]
CONSTRAINED = ["llguidance>=1.9"]
INT8 = ["qwix>=0.1.8,<0.2"]
WANDB = ["wandb>=0.20"]
TEST = ["pytest>=8", "pytest-xdist>=3.5", "setuptools>=77", *TOOLS, *CONSTRAINED, *INT8, *WANDB]

setup(
    name="temper",
    version="0.1.0",
    description="Post-training of language models in JAX, with the ablation experiment as the unit of work",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["models*", "objectives*", "research*", "experiments*", "launch*"]),
    package_data={"experiments": ["**/*.md", "**/*.txt"], "research": ["**/*.md"]},
    # Upper bounds are the newest series that the tests have run with: JAX 0.10 on Python 3.11, 0.11 on 3.12 and 3.13.
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "chex>=0.1.90,<0.2",
        "etils[epath]>=1.10",
        "flax>=0.12,<0.13",
        "grain>=0.2.10,<0.3",
        "importlib_resources>=6.4",  # tensorflow-datasets imports it without declaring it
        "jax>=0.10,<0.12",
        "jaxtyping>=0.3",
        "markdown-it-py>=3",
        "matplotlib>=3.9",
        "ml-collections>=1.0,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pyyaml>=6",
        "rich>=13.9",
        "scipy>=1.14",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.8,<5",
    ],
    extras_require={
        "test": TEST,
        "dev": [*TEST, "mypy>=1.15", "pre-commit>=4", "ruff>=0.12"],
        "tools": TOOLS,
        "constrained": CONSTRAINED,
        "int8": INT8,
        "wandb": WANDB,
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda12]>=0.10,<0.12"],
    },
)
