"""Black-box distillation harvester: asks a teacher, keeps every paid answer, seals them into Parquet.

Import from the module that owns the name (`harvester.store.reader`,
`harvester.store.shards.schema`); this file imports
nothing, so that `import harvester` costs nothing.
"""

__version__ = "0.1.0"
