"""File formats that runtimes load: each checks a plan, saves a checkpoint, decodes what it saved."""
