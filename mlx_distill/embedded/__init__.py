"""What ships with the program: a task, a tokenizer, and a tiny teacher and student for them.
`EMBEDDED` is what `source = "embedded:NAME"` in a recipe may name: generators called with
(partition, count, seed).
"""

from mlx_distill.embedded import task

EMBEDDED = {task.NAME: task.generate}
PARTITIONS = tuple(task.SHARES)
