"""Parts of `benchmarks/quality_real.py`: a model's server and files, and checks by plain transformers."""
