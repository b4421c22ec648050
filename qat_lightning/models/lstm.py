"""A recurrent classifier for dynamic quantization."""

from torch import Tensor, nn


class RowLSTM(nn.Module):
    """An LSTM that reads an image row by row.

    Args:
        in_channels: channels of the image.
        width: pixels of a row.
        hidden_size: size of the LSTM's state.
        num_layers: LSTM layers.
        num_classes: length of the output.
    """

    def __init__(self, in_channels: int = 1, width: int = 8, hidden_size: int = 64, num_layers: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(in_channels * width, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for images ``(N, in_channels, H, width)``."""
        rows = x.permute(0, 2, 1, 3).flatten(2)
        states, _ = self.lstm(rows)
        logits: Tensor = self.fc(states[:, -1])
        return logits
