"""Measure the latency table of a config's model on this machine.

    mmitp profile CONFIG --out table.json [--shape H W] [--batch 1] [--threads N] [--device cpu]

PruneHook(cost=dict(type='latency', table='table.json')) prunes by it. CONFIG is a file or a packaged config, with
masks or without. The table holds the machine, versions, threads and shape it was measured with, and how far it is off
on slimmed networks it has not seen. A former table of the same name is moved aside.
"""

from collections.abc import Sequence

from mmitp.engine.cli import UserError, add_config, add_out, command, needs_out, parser, positive, torch_device


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, __name__)
    add_config(options)
    add_out(options, "JSON file to write", metavar="FILE")
    options.add_argument(
        "--shape",
        type=positive,
        nargs=2,
        metavar=("H", "W"),
        help="input size; by default PruneHook's input_shape, else the training pipeline's if it is fixed, else the "
        "first training image's, else 224 224 for classifiers and 320 320 for detectors",
    )
    options.add_argument("--batch", type=positive, default=1)
    options.add_argument("--threads", type=positive, help="threads of torch (CPU)")
    options.add_argument("--device", default="cpu")
    args = options.parse_args(argv)
    needs_out(options, args)

    from mmitp.engine.config import load_config
    from mmitp.engine.example import blank_example
    from mmitp.engine.results import check_writable, provenance, write_results
    from mmitp.engine.run import device_of
    from mmitp.models.report import build_masked, stated_shape
    from mmitp.pruning.latency import measure_latency

    check_writable(args.out)
    device = torch_device(args.device)
    cfg = load_config(args.config, args.cfg_options)
    try:
        model = build_masked(cfg).to(device)
    except ValueError as error:
        raise UserError(f"{args.config}: {error}") from error
    shape, source = stated_shape(cfg, model, args.shape)
    if source:
        print(f"{shape[0]}x{shape[1]} is {source}", flush=True)
    example = blank_example(model, shape, batch=args.batch)
    table = measure_latency(model, example, args.threads, report=lambda line: print(line, flush=True))
    run = provenance(config=args.config, device=device_of(model))
    table.update(versions=run["versions"], shape=list(shape), batch=args.batch)
    lines = write_results(args.out, table, run)
    print("slimmed networks: MACs kept, ms measured, ms by the table")
    for n in table["networks"]:
        kind = "" if n["fitted"] else "  not among those fitted"
        print(f"{n['ratio']:.3f} {n['measured'] / 1e6:9.3f} {n['predicted'] / 1e6:9.3f}{kind}")
    print("\n".join(lines))
