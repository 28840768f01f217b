from narsil_stream.cli import main

main()
