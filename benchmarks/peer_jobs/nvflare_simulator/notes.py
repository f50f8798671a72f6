"""What is written down at the end of a round, which only the benchmark needs."""

from common import note_round
from nvflare.apis.fl_component import FLComponent
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType


class RoundNotes(FLComponent):
    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def handle_event(self, event_type, fl_ctx):
        if event_type == AppEventType.AFTER_AGGREGATION:
            result = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT)
            note_round(self.folder, result.current_round + 1, lambda: result.params)
