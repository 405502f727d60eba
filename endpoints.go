// The table of endpoints that the proxy forwards: what is not here is 404. (Finding one: endpoints.go.)
// Data only. Never in this table: operations that hand out credentials of the provider account (realtime and
// chatkit sessions) or administer it (organization, projects).
package main

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"unicode"
	"unicode/utf8"
)

type (
	endpointClass uint8
	apiFamily     uint8
	bodyKind      uint8
	endpointFlags uint8
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
	flagModelInPath endpointFlags = 1 << iota
	flagNeedsModel
	flagAddUsage
	flagUpload
)

// endpointRow is one line of the table; endpoint says what the columns mean.
type endpointRow struct {
	method, pattern string
	class           endpointClass
	api             apiFamily
	body            bodyKind
	meter           meterKind
	flags           endpointFlags
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
	{"POST", "/v1/audio/speech", classInference, apiOpenAI, bodyJSON, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/audio/transcriptions", classInference, apiOpenAI, bodyForm, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/audio/translations", classInference, apiOpenAI, bodyForm, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/chat/completions", classInference, apiOpenAI, bodyJSON, meterOpenAI, flagNeedsModel | flagAddUsage},
	{"POST", "/v1/completions", classInference, apiOpenAI, bodyJSON, meterOpenAI, flagNeedsModel | flagAddUsage},
	{"POST", "/v1/embeddings", classInference, apiOpenAI, bodyJSON, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/images/edits", classInference, apiOpenAI, bodyJSONOrForm, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/images/generations", classInference, apiOpenAI, bodyJSON, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/images/variations", classInference, apiOpenAI, bodyForm, meterOpenAI, flagNeedsModel},
	{"GET", "/v1/models", classInference, apiAny, bodyNone, meterNone, 0},
	{"GET", "/v1/models/{model}", classInference, apiAny, bodyNone, meterNone, flagModelInPath},
	{"POST", "/v1/moderations", classInference, apiOpenAI, bodyJSON, meterNone, flagNeedsModel},
	{"POST", "/v1/responses", classInference, apiOpenAI, bodyJSON, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/responses/compact", classInference, apiOpenAI, bodyJSON, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/responses/input_tokens", classInference, apiOpenAI, bodyJSON, meterNone, flagNeedsModel},
	{"POST", "/v1/messages", classInference, apiAnthropic, bodyJSON, meterAnthropic, flagNeedsModel},
	{"POST", "/v1/messages/count_tokens", classInference, apiAnthropic, bodyJSON, meterNone, flagNeedsModel},

	// Stateful: off unless a project turns it on, because all tokens of one provider key share these objects.
	{"GET", "/v1/assistants", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/assistants", classStateful, apiOpenAI, bodyJSON, meterNone, flagNeedsModel},
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
	{"POST", "/v1/batches", classStateful, apiOpenAI, bodyJSON, meterNone, flagNeedsModel},
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
	{"POST", "/v1/containers/{container_id}/files", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, flagUpload},
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
	{"POST", "/v1/evals", classStateful, apiOpenAI, bodyJSON, meterNone, flagNeedsModel},
	{"DELETE", "/v1/evals/{eval_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/evals/{eval_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}/runs", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/evals/{eval_id}/runs", classStateful, apiOpenAI, bodyJSON, meterNone, flagNeedsModel},
	{"DELETE", "/v1/evals/{eval_id}/runs/{run_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}/runs/{run_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/evals/{eval_id}/runs/{run_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}/runs/{run_id}/output_items", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}/runs/{run_id}/output_items/{output_item_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/files", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/files", classStateful, apiOpenAI, bodyForm, meterNone, flagUpload},
	{"DELETE", "/v1/files/{file_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/files/{file_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/files/{file_id}/content", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/alpha/graders/run", classStateful, apiOpenAI, bodyJSON, meterNone, flagNeedsModel},
	{"POST", "/v1/fine_tuning/alpha/graders/validate", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"DELETE", "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions/{permission_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/fine_tuning/jobs", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/jobs", classStateful, apiOpenAI, bodyJSON, meterNone, flagNeedsModel},
	{"GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume", classStateful, apiOpenAI, bodyNone, meterNone, flagNeedsModel},
	{"DELETE", "/v1/models/{model}", classStateful, apiOpenAI, bodyNone, meterNone, flagModelInPath},
	{"POST", "/v1/realtime/calls", classStateful, apiOpenAI, bodyRaw, meterNone, flagNeedsModel},
	{"POST", "/v1/realtime/calls/{call_id}/accept", classStateful, apiOpenAI, bodyJSON, meterNone, flagNeedsModel},
	{"POST", "/v1/realtime/calls/{call_id}/hangup", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/realtime/calls/{call_id}/refer", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/realtime/calls/{call_id}/reject", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"DELETE", "/v1/responses/{response_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/responses/{response_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/responses/{response_id}/cancel", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/responses/{response_id}/input_items", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/skills", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/skills", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, flagUpload},
	{"DELETE", "/v1/skills/{skill_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/skills/{skill_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/skills/{skill_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/skills/{skill_id}/content", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/skills/{skill_id}/versions", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/skills/{skill_id}/versions", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, flagUpload},
	{"DELETE", "/v1/skills/{skill_id}/versions/{version}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/skills/{skill_id}/versions/{version}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/skills/{skill_id}/versions/{version}/content", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/threads/runs", classStateful, apiOpenAI, bodyJSON, meterOpenAI, flagNeedsModel},
	{"DELETE", "/v1/threads/{thread_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/messages", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/messages", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"DELETE", "/v1/threads/{thread_id}/messages/{message_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/messages/{message_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/messages/{message_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/runs", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/runs", classStateful, apiOpenAI, bodyJSON, meterOpenAI, flagNeedsModel},
	{"GET", "/v1/threads/{thread_id}/runs/{run_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/runs/{run_id}", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/runs/{run_id}/cancel", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/runs/{run_id}/steps", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/runs/{run_id}/steps/{step_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/runs/{run_id}/submit_tool_outputs", classStateful, apiOpenAI, bodyJSON, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/uploads", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/uploads/{upload_id}/cancel", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/uploads/{upload_id}/complete", classStateful, apiOpenAI, bodyJSON, meterNone, 0},
	{"POST", "/v1/uploads/{upload_id}/parts", classStateful, apiOpenAI, bodyForm, meterNone, flagUpload},
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
	{"POST", "/v1/videos", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, flagNeedsModel | flagUpload},
	{"POST", "/v1/videos/characters", classStateful, apiOpenAI, bodyForm, meterNone, flagUpload},
	{"GET", "/v1/videos/characters/{character_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/videos/edits", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, flagNeedsModel | flagUpload},
	{"POST", "/v1/videos/extensions", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, flagNeedsModel | flagUpload},
	{"DELETE", "/v1/videos/{video_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/videos/{video_id}", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"GET", "/v1/videos/{video_id}/content", classStateful, apiOpenAI, bodyNone, meterNone, 0},
	{"POST", "/v1/videos/{video_id}/remix", classStateful, apiOpenAI, bodyJSONOrForm, meterNone, flagNeedsModel | flagUpload},
}

var (
	errNoEndpoint  = errors.New("no such endpoint")                          // 404
	errWrongMethod = errors.New("the endpoint does not support this method") // 405
)

const modelPrefix = "/v1/models/"

// endpointTable finds endpoints. It does not change once made.
type endpointTable struct {
	static       map[string]*methodSet // patterns without an id
	root         pathNode              // all patterns but models, by segment
	list         []*endpoint
	modelMethods methodSet // /v1/models/{model}, where the model may contain slashes
}

// methodSet is all methods of one pattern.
type methodSet struct {
	endpoints []*endpoint
	allow     string // "DELETE, GET", for the Allow header
}

type pathNode struct {
	segment    string // the literal segment; "" for an id
	allowColon bool   // the id may contain ':' (fine-tuned models: ft:gpt-4o:org::id)
	literals   map[string]*pathNode
	param      *pathNode
	methods    methodSet
}

// endpointMatch is a request's endpoint.
type endpointMatch struct {
	endpoint *endpoint
	path     string // for the provider, escaped
	model    string // from the path, decoded; "" unless endpoint.flagModelInPath
	allow    string // the methods there are, set with errWrongMethod only
}

func newEndpointTable() *endpointTable {
	t := &endpointTable{static: make(map[string]*methodSet)}
	for _, r := range endpointRows {
		e := &endpoint{
			method: r.method, pattern: r.pattern, class: r.class, api: r.api, body: r.body, meter: r.meter,
			modelInPath: r.flags&flagModelInPath != 0, needsModel: r.flags&flagNeedsModel != 0,
			addUsage: r.flags&flagAddUsage != 0, upload: r.flags&flagUpload != 0,
			label: r.method + " " + r.pattern,
		}
		t.list = append(t.list, e)
		if e.modelInPath {
			t.modelMethods.add(e)
			continue
		}
		n := t.root.findOrAdd(e.pattern)
		n.methods.add(e)
		if !strings.Contains(e.pattern, "{") {
			t.static[e.pattern] = &n.methods
		}
	}
	return t
}

// all returns every endpoint, in the order of the table's rows.
func (t *endpointTable) all() []*endpoint { return t.list }

// findOrAdd returns the node for pattern, making what is missing on the way.
func (n *pathNode) findOrAdd(pattern string) *pathNode {
	for segment := range strings.SplitSeq(pattern[1:], "/") {
		if segment[0] == '{' {
			if n.param == nil {
				n.param = &pathNode{allowColon: segment == "{fine_tuned_model_checkpoint}"}
			}
			n = n.param
			continue
		}
		if n.literals == nil {
			n.literals = make(map[string]*pathNode)
		}
		if n.literals[segment] == nil {
			n.literals[segment] = &pathNode{segment: segment}
		}
		n = n.literals[segment]
	}
	return n
}

func (r *methodSet) add(e *endpoint) {
	r.endpoints = append(r.endpoints, e)
	if r.allow != "" {
		r.allow += ", "
	}
	r.allow += e.method
}

// forMethod returns the match for method; path is the outbound path.
func (r *methodSet) forMethod(method, path, model string) (endpointMatch, error) {
	for _, e := range r.endpoints {
		if e.method == method {
			return endpointMatch{endpoint: e, path: path, model: model}, nil
		}
	}
	if len(r.endpoints) == 0 {
		return endpointMatch{}, errNoEndpoint
	}
	return endpointMatch{allow: r.allow}, errWrongMethod
}

// match finds the endpoint of a request; u is from its request line (host and query do not count). It returns
// errNoEndpoint, or errWrongMethod with match.allow. Paths are compared byte for byte: no escapes (except in a
// model's name), no dot or empty segments, no trailing slash. A literal segment wins over an id for good:
// /v1/responses/compact is never the response "compact", whatever the method.
func (t *endpointTable) match(method string, u *url.URL) (endpointMatch, error) {
	escaped := u.EscapedPath()
	if r := t.static[escaped]; r != nil {
		return r.forMethod(method, r.endpoints[0].pattern, "")
	}
	if rest, ok := strings.CutPrefix(escaped, modelPrefix); ok {
		path, model, ok := parseModelPath(rest)
		if !ok {
			return endpointMatch{}, errNoEndpoint
		}
		return t.modelMethods.forMethod(method, path, model)
	}
	rest, ok := strings.CutPrefix(escaped, "/")
	if !ok {
		return endpointMatch{}, errNoEndpoint
	}
	n, path := &t.root, make([]byte, 0, len(escaped))
	for segment := range strings.SplitSeq(rest, "/") {
		path = append(path, '/')
		if next := n.literals[segment]; next != nil {
			n, path = next, append(path, next.segment...)
		} else if n.param != nil && isValidID(segment, n.param.allowColon) {
			n, path = n.param, append(path, segment...)
		} else {
			return endpointMatch{}, errNoEndpoint
		}
	}
	return n.methods.forMethod(method, string(path), "")
}

// isValidID says whether s is 1 to 128 letters, digits and "_-.", and no way to write a dot segment.
func isValidID(s string, colon bool) bool {
	extra := "_-."
	if colon {
		extra = "_-.:"
	}
	return s != "" && len(s) <= 128 && s[0] != '.' && !strings.Contains(s, "..") && isAlphanumericOr(s, extra)
}

// parseModelPath reads what follows /v1/models/, escaped, and returns the outbound path and the model's name. Raw
// slashes stay raw and escaped ones escaped; each segment is unescaped once, and a '%' that is left is refused,
// so that no decoder further on can find more in it.
func parseModelPath(rest string) (path, model string, ok bool) {
	if len(rest) > 3*maxModelLen {
		return "", "", false
	}
	path = modelPrefix[:len(modelPrefix)-1]
	for segment := range strings.SplitSeq(rest, "/") {
		plain, err := url.PathUnescape(segment)
		if err != nil {
			return "", "", false
		}
		path += "/" + url.PathEscape(plain)
		model += "/" + plain
	}
	model = model[1:]
	if len(model) > maxModelLen || !isAlphanumericOr(model, "._:@+/-") {
		return "", "", false
	}
	for segment := range strings.SplitSeq(model, "/") {
		if segment == "" || segment == "." || strings.Contains(segment, "..") {
			return "", "", false
		}
	}
	return path, model, true
}

// modelOutboundPath returns the outbound path of another model's name, and the one there is if a path cannot hold it.
func modelOutboundPath(name, path string) string {
	if p, _, ok := parseModelPath(strings.ReplaceAll(url.PathEscape(name), "%2F", "/")); ok {
		return p
	}
	return path
}

// queryParams are the query parameters of the operations above. model is not one: no endpoint takes it there, and
// a provider that did would let it go past the check of models. true: it may be repeated.
var queryParams = map[string]bool{
	"after": false, "before": false, "after_id": false, "before_id": false, "starting_after": false,
	"limit": false, "order": false, "order_by": false, "filter": false, "purpose": false, "status": false,
	"name": false, "variant": false, "run_id": false, "group_id": false, "project_id": false, "user": false,
	"stream": false, "include_obfuscation": false, "beta": false, "include": true, "include[]": true,
}

const maxQueryLen = 2 << 10

// cleanQuery returns the query for the provider, in the order of raw and encoded anew. It knows queryParams and
// metadata[key]. An unknown or repeated parameter, a bad escape or value is a *bodyError that names it.
func cleanQuery(raw string) (string, error) {
	if len(raw) > maxQueryLen {
		return "", &bodyError{"", fmt.Sprintf("The query string is longer than %d bytes.", maxQueryLen)}
	}
	if strings.Contains(raw, ";") {
		return "", &bodyError{"", "The query string has a ';', which some servers take for a separator."}
	}
	var out strings.Builder
	seen := make(map[string]bool)
	for pair := range strings.SplitSeq(raw, "&") {
		if pair == "" {
			continue
		}
		rawName, rawValue, _ := strings.Cut(pair, "=")
		name, err1 := url.QueryUnescape(rawName)
		value, err2 := url.QueryUnescape(rawValue)
		if err1 != nil || err2 != nil {
			return "", &bodyError{"", fmt.Sprintf("The query parameter %+q has a bad escape.", rawName)}
		}
		repeatable, known := queryParams[name]
		switch {
		case !known && !isMetadataParam(name):
			return "", &bodyError{name, fmt.Sprintf("Unknown query parameter %+q.", name)}
		case seen[name] && !repeatable:
			return "", &bodyError{name, fmt.Sprintf("Repeated query parameter %+q.", name)}
		case !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl):
			return "", &bodyError{name, fmt.Sprintf("The query parameter %+q has an invalid character.", name)}
		}
		seen[name] = true
		if out.Len() > 0 {
			out.WriteByte('&')
		}
		out.WriteString(url.QueryEscape(name) + "=" + url.QueryEscape(value))
	}
	return out.String(), nil
}

// isMetadataParam says whether name is metadata[key], as in lists that are filtered by metadata.
func isMetadataParam(name string) bool {
	key, ok := strings.CutPrefix(name, "metadata[")
	key, closed := strings.CutSuffix(key, "]")
	return ok && closed && key != "" && len(key) <= 64 && isAlphanumericOr(key, "_-. ")
}
