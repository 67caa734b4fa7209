"""`python -m xloom` is `xloom`; a launcher needs a module: `torchrun --nproc-per-node 2 -m xloom train recipe.yaml`."""

from xloom.cli import main

main()
