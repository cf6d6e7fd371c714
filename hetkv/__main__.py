"""`python -m hetkv` is the `hetkv` command."""

from hetkv.cli import main

raise SystemExit(main())
