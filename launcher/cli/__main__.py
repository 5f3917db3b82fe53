"""python -m bigbatch.launcher.cli: what job scripts of queued runs say."""

from bigbatch.launcher.cli.main import main

if __name__ == "__main__":
    main()
