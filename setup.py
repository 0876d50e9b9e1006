"""Package metadata; tool settings live in pyproject.toml, exact versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"
GLYPHS = ["matplotlib>=3.8", "fonttools>=4.40"]
PICTURES = ["matplotlib>=3.8"]
# The report's pictures and maps; t-SNE and k-means.
REPORT = [*PICTURES, "scikit-learn>=1.4", "jinja2>=3.1", "markupsafe>=2.1"]
# Approximate search, and embeddings as parquet.
SEARCH = ["faiss-cpu>=1.10", "pyarrow>=15"]
EXPORT = ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.2"]
CARS = ["scipy>=1.11"]
# The first that lets several engines share one loss.
DEEPSPEED = ["deepspeed>=0.19.8"]
# Metric losses and miners; the next major release keeps its queues otherwise.
PML = ["pytorch-metric-learning>=2.5,<3"]
# Live metrics; earlier ones leave a partial text file where the disk is full.
MONITOR = ["prometheus-client>=0.22"]

setup(
    name="gcahng",
    version="0.1.0",
    description="Hard negative generation on a graph of the batch (GCA-HNG) for metric learning",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["gcahng", "gcahng.*", "launch", "launch.*", "shards", "shards.*"]),
    package_data={"gcahng": ["py.typed"], "gcahng.report": ["paper_results.yaml", "templates/*"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0",
        "accelerate>=1.1",
        "braceexpand>=0.1.7",
        "pyyaml>=6.0.1",
        "safetensors>=0.4",
        "numpy>=1.26",
        "pillow>=10.3",
        "simplejpeg>=1.8",
        "tqdm>=4.66",
        "tensorboard>=2.17",
        # Remote shards: web servers, and object stores with the package of each (s3fs, gcsfs, ...).
        "urllib3>=2.2.2",
        "fsspec>=2024.2",
    ],
    extras_require={
        # Draw the embedded data set `glyphs`.
        "glyphs": GLYPHS,
        # Read cars_annos.mat of Cars-196.
        "cars": CARS,
        # Optimiser state (stage 1) and gradients (stage 2) spread over processes by ZeRO; DDP does without.
        "deepspeed": DEEPSPEED,
        # Metric losses `pml.NAME` and their miners.
        "pml": PML,
        # monitor.port and monitor.textfile.
        "monitor": MONITOR,
        # Neighbour pictures.
        "pictures": PICTURES,
        # launch/report.py and clustering metrics.
        "report": REPORT,
        # Approximate search, and embeddings as parquet.
        "search": SEARCH,
        # launch/export.py.
        "export": EXPORT,
        # The plain edge-list graph on its usual kernels; compiles against the installed torch, so
        # install it with --no-build-isolation (tools/build_scatter.sh keeps the wheel).
        "scatter": ["torch_scatter>=2.1"],
        # `make test`.
        "test": [
            *CARS,
            *DEEPSPEED,
            *PML,
            *REPORT,
            *SEARCH,
            *EXPORT,
            *MONITOR,
            "playwright>=1.45",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML>=6.0",
            "webdataset>=1.0",
            "build>=1.2",
            "wheel>=0.43",
            "setuptools>=77",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
