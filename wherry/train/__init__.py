"""Training as one program on one or many processes: torchrun -m wherry.train JOB.json, or `loop.run(job)` in place."""
