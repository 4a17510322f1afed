"""The network, the data, and what is done with both."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A perceptron for images of 8 by 8 points."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.out = nn.Linear(32, 10)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


def load_examples():
    """All images, and which digit each shows."""
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def load_central():
    """The examples of the server: every fifth."""
    images, labels = load_examples()
    return DataLoader(TensorDataset(images[::5], labels[::5]), batch_size=64)


def load_partition(partition_id, num_partitions, batch_size, server_round):
    """The examples of one node, to train on and to validate with; the order is another one in each round."""
    images, labels = load_examples()
    theirs = torch.arange(len(images)) % 5 != 0
    images, labels = (part[theirs][partition_id::num_partitions] for part in (images, labels))
    order = torch.Generator().manual_seed(1000 * server_round + partition_id)
    cut = len(images) * 4 // 5
    training = TensorDataset(images[:cut], labels[:cut])
    validation = TensorDataset(images[cut:], labels[cut:])
    return DataLoader(training, batch_size, shuffle=True, generator=order), DataLoader(validation, batch_size)


def train(net, loader, epochs, lr):
    """Trains the network; the mean loss of all batches."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


def test(net, loader):
    """The mean loss, and the share of digits that are recognised."""
    criterion = nn.CrossEntropyLoss(reduction="sum")
    net.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for images, labels in loader:
            outputs = net(images)
            loss += criterion(outputs, labels).item()
            correct += (outputs.argmax(1) == labels).sum().item()
    return loss / len(loader.dataset), correct / len(loader.dataset)
