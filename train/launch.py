"""`accelerate launch`, where torchvision was built for another torch too.

    python -m train.launch --config_file train/configs/ddp.yaml -m train.train_vilex ...

accelerate's own command imports torchvision before any code of ours can mend it. Where the two fit,
`accelerate launch` with the same arguments does the same.
"""

from accelerate.commands.launch import main

if __name__ == "__main__":
    main()
