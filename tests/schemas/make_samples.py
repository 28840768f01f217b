"""Write the samples of version 1 that are not stored yet. What is stored is a promise: it is never overwritten."""

from test_samples import FOLDER, SAMPLES


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, sample in SAMPLES.items():
        try:
            with (FOLDER / name).open("xb") as file:
                file.write(sample.encode())
            print(f"wrote {name}")
        except FileExistsError:
            pass


if __name__ == "__main__":
    main()
