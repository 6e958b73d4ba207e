import sys
from pathlib import Path

# scripts are no part of the package: they import one another by name, from their own folder
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
