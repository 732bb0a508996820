"""The table of the part `steps` of gpu.py."""

from typing import Any

from gpu_call import Call, save, table

PEERS = {"eager": "PyTorch eager", "compiled": "torch.compile"}


def show(call: Call, there: dict, rates: dict[str, float], rows: dict[str, dict]) -> None:
    """The table so far."""
    columns = (
        "step",
        "ms (quartiles)",
        "images/s",
        "TFLOP/s",
        "of matmul",
        "of roofline",
        "GB",
        "compilation, s",
        *(f"{name}: ms, ratio, GB" for name in PEERS.values()),
    )
    unknown = "not measured" if "torch" in there else "no PyTorch"
    text = table(
        columns,
        [
            [name, *cells(row), *(peer_cell(row.get(peer, {}), unknown) for peer in PEERS)]
            for name, row in rows.items()
        ],
    )
    text += (
        "\n\nRatio: PyTorch's time over qmx's. Rotation's images are counted before turning. "
        f"(read): compiled by an earlier call. {there['card']}."
    )
    save(call, "steps", {"machine": there, "rates": rates, "rows": rows}, text)


def cells(row: dict[str, Any]) -> list[str]:
    """The figures of qmx's side as text."""
    if "ms" not in row:
        return [row.get("error", "not measured"), *["not measured"] * 6]
    low, high = row["ms_quartiles"]
    return [
        f"{row['ms']:.4g} ({low:.4g} .. {high:.4g})",
        f"{row['images_per_second']:,.0f}",
        f"{row['tflops']:.3g}",
        f"{100 * row['share_of_matmul']:.1f} %",
        f"{100 * row['share_of_roofline']:.1f} %",
        gigabytes(row["memory_bytes"]),
        f"{row['compile_seconds']:.1f}{' (read)' if row['compiled_before'] else ''}",
    ]


def peer_cell(found: dict[str, Any], unknown: str) -> str:
    """The figures of PyTorch's side as text."""
    if "ms" not in found:
        return found.get("error", unknown)
    memory = f", {gigabytes(found['memory_bytes'])}" if found["memory_bytes"] else ""
    return f"{found['ms']:.4g}, {found['ratio']:.2f}{memory}"


def gigabytes(size: int | None) -> str:
    """Bytes as text."""
    return f"{size / 1e9:.3g}" if size else "?"
