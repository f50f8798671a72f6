"""`python -m peft_ravan` is the command line."""

from peft_ravan_cli import main


main()
