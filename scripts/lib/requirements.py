"""Prints what setup.cfg says the project needs at run time, one word each."""

import configparser
from pathlib import Path

config = configparser.ConfigParser()
config.read(Path(__file__).resolve().parents[2] / "setup.cfg")
for line in config["options"]["install_requires"].split("\n"):
    if word := line.split("#")[0].strip().replace(" ", ""):
        print(word)
