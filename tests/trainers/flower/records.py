"""Any records of Flower, for property tests."""

import hypothesis.strategies as st
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from peft_ravan.trainers.exchange import ClientReply
from peft_ravan.trainers.flower.codec import HEADER, RECORD, TENSORS


scalars = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.booleans() | st.text(max_size=9) | st.binary(max_size=99)
any_array = st.builds(
    Array,
    st.sampled_from(["bytes", "float32", "../x"]),
    st.lists(st.integers(-(10**18), 10**18), max_size=2).map(tuple) | st.just((8,)),
    st.sampled_from(["peft-ravan.message", "numpy.ndarray", "pickle"]),
    st.binary(max_size=64) | st.just(ClientReply(1, "north").to_bytes()),
)
some_names = st.sampled_from([RECORD, HEADER, TENSORS, "", "/", "../../.bashrc"]) | st.text(max_size=5)
any_record = (
    st.dictionaries(some_names, any_array, max_size=4).map(ArrayRecord)
    | st.dictionaries(some_names, scalars, max_size=4).map(ConfigRecord)
    | st.dictionaries(some_names, st.integers(-9, 9) | st.floats(), max_size=4).map(MetricRecord)
)
any_content = st.dictionaries(some_names, any_record, max_size=3).map(RecordDict)
