// The table of endpoints that the proxy forwards: what is not here is 404. (Finding one: endpointmatch.go.)
// Data only. Never in this table: operations that hand out credentials of the provider account (realtime and
// chatkit sessions) or administer it (organization, projects).
package main

type (
	endpointClass uint8
	apiFamily     uint8
	bodyKind      uint8
	traits        uint8
)

const (
	classInference endpointClass = iota // the answer depends on this request alone
	classStateful                       // reads or changes objects that are kept at the provider
)

const (
	apiOpenAI apiFamily = iota
	apiAnthropic
	apiAny // both kinds of provider have it
)

const (
	bodyNone bodyKind = iota // no body is forwarded
	bodyJSON
	bodyForm // multipart/form-data
	bodyJSONOrForm
	bodyRaw // application/sdp or a form
)

const (
	modelInPath traits = 1 << iota
	needsModel
	addUsage
	upload
)

// endpointRow is one line of the table; endpoint says what the columns mean.
type endpointRow struct {
	method, pattern string
	class           endpointClass
	api             apiFamily
	body            bodyKind
	meter           meterKind
	traits          traits
}

// endpoint is an operation that the proxy forwards.
type endpoint struct {
	method, pattern string // pattern as in "/v1/files/{file_id}"
	class           endpointClass
	api             apiFamily
	body            bodyKind
	meter           meterKind
	modelInPath     bool   // match.model is set
	needsModel      bool   // runs a model: without a model name that policy can check it is refused where models are restricted
	addUsage        bool   // the proxy may add stream_options.include_usage
	upload          bool   // a form may be far larger than memory and is streamed, unscanned
	label           string // see name
}

// name is the endpoint in logs, metrics and policies: "POST /v1/chat/completions".
func (e *endpoint) name() string { return e.label }

// endpointRows is every operation there is. The OpenAI lines are those of its specification of 2026-08-21.
var endpointRows = []endpointRow{
	// Inference: on by default.
	{"POST", "/v1/audio/speech", classInference, apiOpenAI, bodyJSON, meterOpenAI, needsModel},
	{"POST", "/v1/audio/transcriptions", classInference, apiOpenAI, bodyForm, meterOpenAI, needsModel},
	{"POST", "/v1/audio/translations", classInference, apiOpenAI, bodyForm, meterOpenAI, needsModel},
	{"POST", "/v1/chat/completions", classInference, apiOpenAI, bodyJSON, meterOpenAI, needsModel | addUsage},
	{"POST", "/v1/completions", classInference, apiOpenAI, bodyJSON, meterOpenAI, needsModel | addUsage},
	{"POST", "/v1/embeddings", classInference, apiOpenAI, bodyJSON, meterOpenAI, needsModel},
	{"POST", "/v1/images/edits", classInference, apiOpenAI, bodyJSONOrForm, meterOpenAI, needsModel},
	{"POST", "/v1/images/generations", classInference, apiOpenAI, bodyJSON, meterOpenAI, needsModel},
	{"POST", "/v1/images/variations", classInference, apiOpenAI, bodyForm, meterOpenAI, needsModel},
	{"GET", "/v1/models", classInference, apiAny, bodyNone, meterNone, 0},
	{"GET", "/v1/models/{model}", classInference, apiAny, bodyNone, meterNone, modelInPath},
	{"POST", "/v1/moderations", classInference, apiOpenAI, bodyJSON, meterNone, needsModel},
	{"POST", "/v1/responses", classInference, apiOpenAI, bodyJSON, meterOpenAI, needsModel},
	{"POST", "/v1/responses/compact", classInference, apiOpenAI, bodyJSON, meterOpenAI, needsModel},
	{"POST", "/v1/responses/input_tokens", classInference, apiOpenAI, bodyJSON, meterNone, needsModel},
	{"POST", "/v1/messages", classInference, apiAnthropic, bodyJSON, meterAnthropic, needsModel},
	{"POST", "/v1/messages/count_tokens", classInference, apiAnthropic, bodyJSON, meterNone, needsModel},

	// Stateful: off unless a project turns it on, because all tokens of one provider key share these objects.
	{"GET", "/v1/assistants", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/assistants", classStateful, apiOpenAI, bodyJSON, meterNone, needsModel},
	{"DELETE", "/v1/assistants/{assistant_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/assistants/{assistant_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/assistants/{assistant_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/audio/voice_consents", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/audio/voice_consents", classStateful, apiOpenAI, bodyForm, meterNone, 0},
	{"DELETE", "/v1/audio/voice_consents/{consent_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/audio/voice_consents/{consent_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/audio/voice_consents/{consent_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/audio/voices", classStateful, apiOpenAI, bodyForm, meterNone, 0},
	{"GET", "/v1/batches", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/batches", classStateful, apiOpenAI, bodyJSON, meterNone, needsModel},
	{"GET", "/v1/batches/{batch_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/batches/{batch_id}/cancel", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/chat/completions", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"DELETE", "/v1/chat/completions/{completion_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/chat/completions/{completion_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/chat/completions/{completion_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/chat/completions/{completion_id}/messages", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/chatkit/threads", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"DELETE", "/v1/chatkit/threads/{thread_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/chatkit/threads/{thread_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/chatkit/threads/{thread_id}/items", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/containers", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/containers", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"DELETE", "/v1/containers/{container_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/containers/{container_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/containers/{container_id}/files", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/containers/{container_id}/files", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, upload},
	{"DELETE", "/v1/containers/{container_id}/files/{file_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/containers/{container_id}/files/{file_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/containers/{container_id}/files/{file_id}/content", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/content_provenance_checks", classStateful, apiOpenAI, bodyForm, meterNone, 0},
	{"POST", "/v1/conversations", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"DELETE", "/v1/conversations/{conversation_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/conversations/{conversation_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/conversations/{conversation_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/conversations/{conversation_id}/items", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/conversations/{conversation_id}/items", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"DELETE", "/v1/conversations/{conversation_id}/items/{item_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/conversations/{conversation_id}/items/{item_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/evals", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/evals", classStateful, apiOpenAI, bodyJSON, meterNone, needsModel},
	{"DELETE", "/v1/evals/{eval_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/evals/{eval_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}/runs", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/evals/{eval_id}/runs", classStateful, apiOpenAI, bodyJSON, meterNone, needsModel},
	{"DELETE", "/v1/evals/{eval_id}/runs/{run_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}/runs/{run_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/evals/{eval_id}/runs/{run_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}/runs/{run_id}/output_items", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}/runs/{run_id}/output_items/{output_item_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/files", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/files", classStateful, apiOpenAI, bodyForm, meterNone, upload},
	{"DELETE", "/v1/files/{file_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/files/{file_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/files/{file_id}/content", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/alpha/graders/run", classStateful, apiOpenAI, bodyJSON, meterNone, needsModel},
	{"POST", "/v1/fine_tuning/alpha/graders/validate", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"DELETE", "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions/{permission_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/fine_tuning/jobs", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/jobs", classStateful, apiOpenAI, bodyJSON, meterNone, needsModel},
	{"GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume", classStateful, apiOpenAI, bodyNone, meterNone, needsModel},
	{"DELETE", "/v1/models/{model}", classStateful, apiOpenAI, bodyNone, meterNone, modelInPath},
	{"POST", "/v1/realtime/calls", classStateful, apiOpenAI, bodyRaw, meterNone, needsModel},
	{"POST", "/v1/realtime/calls/{call_id}/accept", classStateful, apiOpenAI, bodyJSON, meterNone, needsModel},
	{"POST", "/v1/realtime/calls/{call_id}/hangup", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/realtime/calls/{call_id}/refer", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/realtime/calls/{call_id}/reject", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"DELETE", "/v1/responses/{response_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/responses/{response_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/responses/{response_id}/cancel", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/responses/{response_id}/input_items", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/skills", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/skills", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, upload},
	{"DELETE", "/v1/skills/{skill_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/skills/{skill_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/skills/{skill_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/skills/{skill_id}/content", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/skills/{skill_id}/versions", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/skills/{skill_id}/versions", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, upload},
	{"DELETE", "/v1/skills/{skill_id}/versions/{version}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/skills/{skill_id}/versions/{version}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/skills/{skill_id}/versions/{version}/content", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/threads/runs", classStateful, apiOpenAI, bodyJSON, meterOpenAI, needsModel},
	{"DELETE", "/v1/threads/{thread_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/messages", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/messages", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"DELETE", "/v1/threads/{thread_id}/messages/{message_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/messages/{message_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/messages/{message_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/runs", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/runs", classStateful, apiOpenAI, bodyJSON, meterOpenAI, needsModel},
	{"GET", "/v1/threads/{thread_id}/runs/{run_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/runs/{run_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/runs/{run_id}/cancel", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/runs/{run_id}/steps", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/runs/{run_id}/steps/{step_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/runs/{run_id}/submit_tool_outputs", classStateful, apiOpenAI, bodyJSON, meterOpenAI, needsModel},
	{"POST", "/v1/uploads", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/uploads/{upload_id}/cancel", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/uploads/{upload_id}/complete", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/uploads/{upload_id}/parts", classStateful, apiOpenAI, bodyForm, meterNone, upload},
	{"GET", "/v1/vector_stores", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/vector_stores", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"DELETE", "/v1/vector_stores/{vector_store_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/vector_stores/{vector_store_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/vector_stores/{vector_store_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/vector_stores/{vector_store_id}/file_batches", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}/cancel", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}/files", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/vector_stores/{vector_store_id}/files", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/vector_stores/{vector_store_id}/files", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"DELETE", "/v1/vector_stores/{vector_store_id}/files/{file_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/vector_stores/{vector_store_id}/files/{file_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/vector_stores/{vector_store_id}/files/{file_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/vector_stores/{vector_store_id}/files/{file_id}/content", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/vector_stores/{vector_store_id}/search", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/videos", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/videos", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, needsModel | upload},
	{"POST", "/v1/videos/characters", classStateful, apiOpenAI, bodyForm, meterNone, upload},
	{"GET", "/v1/videos/characters/{character_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/videos/edits", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, needsModel | upload},
	{"POST", "/v1/videos/extensions", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, needsModel | upload},
	{"DELETE", "/v1/videos/{video_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/videos/{video_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/videos/{video_id}/content", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/videos/{video_id}/remix", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, needsModel | upload},
}
