"""What the benchmarks share: dense rivals, models at a density, arithmetic, one way to report.

Scripts lie beside this package and are run as `python bench/<name>.py`; nothing here is shipped.
"""
