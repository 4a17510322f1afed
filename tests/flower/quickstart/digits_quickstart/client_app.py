"""The client's side."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_quickstart.task import Net, load_partition
from digits_quickstart.task import test as test_fn
from digits_quickstart.task import train as train_fn

app = ClientApp()


def load(msg: Message, context: Context):
    """The network with the weights received, and this node's examples."""
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loaders = load_partition(
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        context.run_config["batch-size"],
        msg.content["config"]["server-round"],
    )
    return net, *loaders


@app.train()
def train(msg: Message, context: Context):
    """Trains on this node's examples."""
    net, loader, _ = load(msg, context)
    loss = train_fn(net, loader, context.run_config["local-epochs"], msg.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Measures on this node's examples."""
    net, _, loader = load(msg, context)
    loss, accuracy = test_fn(net, loader)
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
