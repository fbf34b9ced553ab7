"""Explain what two small Transformers see in a molecule: one reads its SMILES string, one its graph.

    pip install rdkit
    python examples/molecules.py --data ../shared/data/bace/bace.csv --out out/molecules.png

Both learn whether a molecule inhibits the enzyme BACE-1 (MoleculeNet; a table with the columns smiles and
Class), in minutes on a CPU. The picture shows held-out molecules with every atom in the colour of its
relevance for "inhibits": red speaks for it, blue against it.

The graph model has the encodings of Graphormer (Ying et al. 2021): degrees beside the atoms, distances and
bonds of pairs as a bias of attention. All four are lookups of integers and are explained by name.
"""

import argparse
import csv
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fxlrp

#: Atoms in brackets, two-letter elements, single letters; digits, bonds and branches are tokens too.
TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|%\d\d|.")
ATOM = re.compile(r"\[|Br|Cl|[A-Za-z]")
LONGEST = 128  #: tokens
FURTHEST, BONDS, ELEMENTS, DEGREES = 20, 6, 60, 8  #: table sizes; larger numbers share the last row


@dataclass(frozen=True)
class Molecule:
    """A molecule as both models read it: N atoms, T tokens; 0 is padding everywhere."""

    smiles: str
    tokens: list[str]
    atoms: Tensor  #: [N] atomic numbers
    degrees: Tensor  #: [N] neighbours + 1
    distances: Tensor  #: [N, N] bonds on the shortest path + 1
    bonds: Tensor  #: [N, N] kind of bond between neighbours
    label: int


# --- the models ------------------------------------------------------------


class SmilesTransformer(nn.Module):
    """Tokens and positions through PyTorch's own encoder; the mean of all tokens is classified."""

    def __init__(self, vocabulary: int, width: int = 64, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] to logits [B, 2]."""
        real = tokens != 0
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        x = self.encoder(x, src_key_padding_mask=~real)
        weights = real / real.sum(1, keepdim=True)
        return self.head((x * weights.unsqueeze(-1)).sum(1))


class GraphLayer(nn.Module):
    """Pre-norm attention with a bias for each pair of nodes, and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Nodes [B, N, C] and biases [B, H, N, N] to nodes."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GraphTransformer(nn.Module):
    """Graphormer's encodings: degrees at the nodes, distances and bonds in attention, a virtual node."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.atom = nn.Embedding(ELEMENTS, width, padding_idx=0)
        self.degree = nn.Embedding(DEGREES, width, padding_idx=0)
        self.distance, self.bond = nn.Embedding(FURTHEST, heads), nn.Embedding(BONDS, heads)
        self.virtual = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.layers = nn.ModuleList(GraphLayer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, atoms: Tensor, degrees: Tensor, distances: Tensor, bonds: Tensor) -> Tensor:
        """Atoms and degrees [B, N], distances and bonds [B, N, N] to logits [B, 2]."""
        x = self.atom(atoms) + self.degree(degrees)
        x = torch.cat([self.virtual.expand(x.shape[0], -1, -1), x], 1)
        bias = (self.distance(distances) + self.bond(bonds)).permute(0, 3, 1, 2)
        bias = F.pad(bias, (1, 0, 1, 0))  # the virtual node, which is near to all
        bias = bias.masked_fill(F.pad(atoms == 0, (1, 0))[:, None, None], -torch.inf)
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(self.norm(x[:, 0]))


# --- the data --------------------------------------------------------------


def read(path: Path, limit: int | None) -> list[Molecule]:
    """The table's molecules that fit into :data:`LONGEST` tokens."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:limit]
    found = [parse(row["smiles"], int(row["Class"])) for row in tqdm(rows, "molecules", leave=False)]
    return [molecule for molecule in found if molecule is not None]


def parse(smiles: str, label: int) -> Molecule | None:
    """One molecule, None where it is too long or cannot be read."""
    from rdkit import Chem

    made, tokens = Chem.MolFromSmiles(smiles), TOKEN.findall(smiles)
    if made is None or len(tokens) > LONGEST:
        return None
    atoms = list(made.GetAtoms())
    bonds = torch.zeros(len(atoms), len(atoms), dtype=torch.long)
    kinds = {
        Chem.BondType.SINGLE: 1,
        Chem.BondType.DOUBLE: 2,
        Chem.BondType.TRIPLE: 3,
        Chem.BondType.AROMATIC: 4,
    }
    for bond in made.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        bonds[i, j] = bonds[j, i] = kinds.get(bond.GetBondType(), 5)
    distances = torch.from_numpy(Chem.GetDistanceMatrix(made)).long() + 1
    return Molecule(
        smiles,
        tokens,
        torch.tensor([a.GetAtomicNum() for a in atoms]).clamp_max(ELEMENTS - 1),
        torch.tensor([a.GetDegree() + 1 for a in atoms]).clamp_max(DEGREES - 1),
        distances.clamp_max(FURTHEST - 1),
        bonds,
        label,
    )


def graphs(molecules: Sequence[Molecule]) -> dict[str, Tensor]:
    """The graph model's inputs, padded."""
    most = max(len(m.atoms) for m in molecules)

    def padded(name: str) -> Tensor:
        tensors = [getattr(m, name) for m in molecules]
        return torch.stack([F.pad(t, (0, most - len(t)) * t.dim()) for t in tensors])

    return {name: padded(name) for name in ("atoms", "degrees", "distances", "bonds")}


def strings(molecules: Sequence[Molecule], vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """The SMILES model's inputs, padded; 1 is an unknown token."""
    most = max(len(m.tokens) for m in molecules)
    rows = [[vocabulary.get(t, 1) for t in m.tokens] + [0] * (most - len(m.tokens)) for m in molecules]
    return {"tokens": torch.tensor(rows)}


# --- training and explaining -----------------------------------------------


def train(model: nn.Module, inputs: Any, molecules: list[Molecule], epochs: int, title: str) -> None:
    """Adam with a linear decay; molecules of about one size share a batch."""
    steps = epochs * -(-len(molecules) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    with tqdm(total=steps, desc=title, leave=False) as bar:
        for _ in range(epochs):
            order = sorted(molecules, key=lambda m: (len(m.atoms) // 8, random.random()))
            batches = [order[i : i + 32] for i in range(0, len(order), 32)]
            for batch in random.sample(batches, len(batches)):
                loss = F.cross_entropy(model(**inputs(batch)), torch.tensor([m.label for m in batch]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
                bar.set_postfix(loss=f"{loss.item():.2f}")
                bar.update()
    model.eval().requires_grad_(False)


def scores(model: nn.Module, inputs: Any, molecules: Sequence[Molecule]) -> Tensor:
    """Probabilities of "inhibits" [len(molecules)]."""
    return torch.cat([model(**inputs([m])).softmax(-1)[:, 1] for m in molecules])


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """The probability that a positive scores higher than a negative."""
    above = scores[labels == 1][:, None] - scores[labels == 0][None]
    return float(((above > 0).float() + 0.5 * (above == 0).float()).mean())


def atom_relevance(molecule: Molecule, found: fxlrp.Explanation) -> Tensor:
    """Relevance by atom [N]: of its token in the SMILES string, which has the atoms in the graph's order, or
    of all that the graph says of it; a pair's goes half to either atom.
    """
    if isinstance(found.relevance, Tensor):
        return found.relevance[0, [i for i, token in enumerate(molecule.tokens) if ATOM.match(token)]]
    by_name = {name: relevance[0] for name, relevance in found.relevance.items()}
    pairs = by_name["distances"] + by_name["bonds"]
    return by_name["atoms"] + by_name["degrees"] + 0.5 * (pairs.sum(0) + pairs.sum(1))


def draw(path: Path, panels: list[tuple[Molecule, Tensor, str]], columns: int) -> None:
    """A PNG of molecules whose atoms are coloured: white is 0, the strongest atom of each has full colour."""
    from rdkit import Chem
    from rdkit.Chem.Draw import rdMolDraw2D

    rows = -(-len(panels) // columns)
    canvas = rdMolDraw2D.MolDraw2DCairo(columns * 420, rows * 320, 420, 320)
    canvas.drawOptions().useBWAtomPalette()
    canvas.drawOptions().legendFontSize = 18
    colors = []
    for _, relevance, _ in panels:
        share = (relevance / relevance.abs().max()).tolist()
        colors.append(
            {i: (1.0, 1.0 - s, 1.0 - s) if s > 0 else (1.0 + s, 1.0 + s, 1.0) for i, s in enumerate(share)}
        )
    canvas.DrawMolecules(
        [Chem.MolFromSmiles(m.smiles) for m, _, _ in panels],
        highlightAtoms=[list(c) for c in colors],
        highlightAtomColors=colors,
        highlightBonds=[[] for _ in panels],
        legends=[title for _, _, title in panels],
    )
    canvas.FinishDrawing()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(canvas.GetDrawingText())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a table with the columns smiles and Class")
    parser.add_argument("--out", type=Path, default=Path("out/molecules.png"), help="the picture")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--limit", type=int, help="molecules to read (default: all)")
    arguments = parser.parse_args(argv)
    try:
        import rdkit  # noqa: F401
    except ImportError:
        print("Molecules are read and drawn with RDKit: pip install rdkit", file=sys.stderr)
        return 1
    random.seed(0)
    torch.manual_seed(0)
    molecules = read(arguments.data, arguments.limit)
    random.shuffle(molecules)
    split = len(molecules) * 4 // 5
    learnt, held_out = molecules[:split], molecules[split:]
    words = sorted({token for m in learnt for token in m.tokens})
    vocabulary = {token: i for i, token in enumerate(words, 2)}
    models: dict[str, tuple[nn.Module, Any]] = {
        "SMILES": (SmilesTransformer(len(words) + 2), lambda batch: strings(batch, vocabulary)),
        "graph": (GraphTransformer(), graphs),
    }
    labels = torch.tensor([m.label for m in held_out])
    probabilities = {}
    for name, (model, inputs) in models.items():
        train(model, inputs, learnt, arguments.epochs, name)
        probabilities[name] = scores(model, inputs, held_out)
        auc = area_under_curve(probabilities[name], labels)
        print(f"{name} model: ROC AUC {auc:.3f} on {len(held_out)} molecules held out at random")
    both = torch.stack(list(probabilities.values())).amin(0)
    shown = [held_out[i] for i in both.masked_fill(labels == 0, -1.0).topk(3).indices.tolist()]
    panels = []
    for name, (model, inputs) in models.items():
        explainer = fxlrp.lrp_compile(model, inputs=tuple(inputs(shown)))
        for i, molecule in enumerate(shown):
            found = explainer(**inputs([molecule]), target=fxlrp.LogitDifference(1, 0))
            title = f"{name}: {found.value.item():+.1f} for 'inhibits'"
            panels.append((molecule, atom_relevance(molecule, found), title))
            if i == 0:
                print(f"\n{name} model, first molecule of the picture\n{found.ledger}")
    draw(arguments.out, panels, columns=len(shown))
    print(f"\nwrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
