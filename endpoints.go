// This file has the table of endpoints that the proxy forwards, and matches requests against it. Whatever is
// not in the table is a 404. Paths are compared byte for byte, and the outbound path is built from the pattern
// and checked ids, so no client can send the provider a path that the table does not name. Plain code.
package main

import (
	"cmp"
	"errors"
	"hash/fnv"
	"net/url"
	"slices"
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
	apiGemini // Google's own
	apiAny    // providers of the first two have it
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
	flagAnthropic // the API family is Anthropic's
	flagAnyAPI    // every API family has it
)

// An endpoint is an operation that the proxy forwards.
type endpoint struct {
	method, pattern string // a pattern is like "/v1/files/{file_id}"
	class           endpointClass
	api             apiFamily
	body            bodyKind
	meter           meterKind
	modelInPath     bool // match sets endpointMatch.model
	// needsModel: it runs a model. Where models are restricted, a request is refused if it names no model
	// that the policy can check.
	needsModel bool
	addUsage   bool   // the proxy may add stream_options.include_usage
	upload     bool   // a form may be far larger than memory: it is streamed without a scan
	label      string // see name
}

// name is the endpoint in logs, metrics and policies: "POST /v1/chat/completions".
func (e *endpoint) name() string { return e.label }

// An endpointRow is one pattern and its methods. Only POST has the row's body and meter, and its flags but
// flagModelInPath.
type endpointRow struct {
	methods, pattern string
	body             bodyKind
	meter            meterKind
	flags            endpointFlags
}

// The tables follow OpenAI's specification of 2026-08-21, Anthropic's API and Gemini's. They never change. Operations
// that hand out credentials of the provider account (realtime and chatkit sessions) or administer it (organization,
// projects, webhook endpoints) must never be in them. Sessions of agents and of live audio need a WebSocket, which the
// proxy does not carry. Assistants, threads and evals are deprecated by OpenAI; their rows remain for providers that
// have them.

// inferenceEndpoints are on by default.
var inferenceEndpoints = []endpointRow{
	{"POST", "/v1/audio/speech", bodyJSON, meterMedia, flagNeedsModel},
	{"POST", "/v1/audio/transcriptions", bodyForm, meterTranscripts, flagNeedsModel},
	{"POST", "/v1/audio/translations", bodyForm, meterTranscripts, flagNeedsModel},
	{"POST", "/v1/chat/completions", bodyJSON, meterOpenAI, flagNeedsModel | flagAddUsage},
	{"POST", "/v1/completions", bodyJSON, meterOpenAI, flagNeedsModel | flagAddUsage},
	{"POST", "/v1/embeddings", bodyJSON, meterEmbeddings, flagNeedsModel},
	{"POST", "/v1/images/edits", bodyJSONOrForm, meterMedia, flagNeedsModel},
	{"POST", "/v1/images/generations", bodyJSON, meterMedia, flagNeedsModel},
	{"POST", "/v1/images/variations", bodyForm, meterMedia, flagNeedsModel},
	{"GET", "/v1/models", bodyNone, meterNone, flagAnyAPI},
	{"GET", "/v1/models/{model}", bodyNone, meterNone, flagAnyAPI | flagModelInPath},
	{"POST", "/v1/moderations", bodyJSON, meterNone, flagNeedsModel},
	{"POST", "/v1/responses", bodyJSON, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/responses/compact", bodyJSON, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/responses/input_tokens", bodyJSON, meterNone, flagNeedsModel},
	{"POST", "/v1/messages", bodyJSON, meterAnthropic, flagAnthropic | flagNeedsModel},
	{"POST", "/v1/messages/count_tokens", bodyJSON, meterNone, flagAnthropic | flagNeedsModel},
	{"GET", "/v1beta/models", bodyNone, meterNone, 0},
	{"GET", "/v1beta/models/{model}", bodyNone, meterNone, flagModelInPath},
	{"POST", "/v1beta/models/{model}:batchEmbedContents", bodyJSON, meterEmbeddings, flagModelInPath | flagNeedsModel},
	{"POST", "/v1beta/models/{model}:countTokens", bodyJSON, meterNone, flagModelInPath | flagNeedsModel},
	{"POST", "/v1beta/models/{model}:embedContent", bodyJSON, meterEmbeddings, flagModelInPath | flagNeedsModel},
	{"POST", "/v1beta/models/{model}:generateContent", bodyJSON, meterGemini, flagModelInPath | flagNeedsModel},
	{"POST", "/v1beta/models/{model}:streamGenerateContent", bodyJSON, meterGemini, flagModelInPath | flagNeedsModel},
}

// statefulEndpoints are off unless a project turns them on: all tokens of one provider key share their objects.
var statefulEndpoints = []endpointRow{
	{"GET POST", "/v1/assistants", bodyJSON, meterNone, flagNeedsModel},
	{"DELETE GET POST", "/v1/assistants/{assistant_id}", bodyJSON, meterNone, 0},
	{"GET POST", "/v1/audio/voice_consents", bodyForm, meterNone, 0},
	{"DELETE GET POST", "/v1/audio/voice_consents/{consent_id}", bodyJSON, meterNone, 0},
	{"POST", "/v1/audio/voices", bodyForm, meterNone, 0},
	{"GET POST", "/v1/batches", bodyJSON, meterNone, flagNeedsModel},
	{"GET", "/v1/batches/{batch_id}", bodyNone, meterNone, 0},
	{"POST", "/v1/batches/{batch_id}/cancel", bodyNone, meterNone, 0},
	{"GET", "/v1/chat/completions", bodyNone, meterNone, 0},
	{"DELETE GET POST", "/v1/chat/completions/{completion_id}", bodyJSON, meterNone, 0},
	{"GET", "/v1/chat/completions/{completion_id}/messages", bodyNone, meterNone, 0},
	{"GET", "/v1/chatkit/threads", bodyNone, meterNone, 0},
	{"DELETE GET", "/v1/chatkit/threads/{thread_id}", bodyNone, meterNone, 0},
	{"GET", "/v1/chatkit/threads/{thread_id}/items", bodyNone, meterNone, 0},
	{"GET POST", "/v1/containers", bodyJSON, meterNone, 0},
	{"DELETE GET", "/v1/containers/{container_id}", bodyNone, meterNone, 0},
	{"GET POST", "/v1/containers/{container_id}/files", bodyJSONOrForm, meterNone, flagUpload},
	{"DELETE GET", "/v1/containers/{container_id}/files/{file_id}", bodyNone, meterNone, 0},
	{"GET", "/v1/containers/{container_id}/files/{file_id}/content", bodyNone, meterNone, 0},
	{"POST", "/v1/content_provenance_checks", bodyForm, meterNone, 0},
	{"POST", "/v1/conversations", bodyJSON, meterNone, 0},
	{"DELETE GET POST", "/v1/conversations/{conversation_id}", bodyJSON, meterNone, 0},
	{"GET POST", "/v1/conversations/{conversation_id}/items", bodyJSON, meterNone, 0},
	{"DELETE GET", "/v1/conversations/{conversation_id}/items/{item_id}", bodyNone, meterNone, 0},
	{"GET POST", "/v1/evals", bodyJSON, meterNone, flagNeedsModel},
	{"DELETE GET POST", "/v1/evals/{eval_id}", bodyJSON, meterNone, 0},
	{"GET POST", "/v1/evals/{eval_id}/runs", bodyJSON, meterNone, flagNeedsModel},
	{"DELETE GET POST", "/v1/evals/{eval_id}/runs/{run_id}", bodyNone, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}/runs/{run_id}/output_items", bodyNone, meterNone, 0},
	{"GET", "/v1/evals/{eval_id}/runs/{run_id}/output_items/{output_item_id}", bodyNone, meterNone, 0},
	{"GET POST", "/v1/files", bodyForm, meterNone, flagAnyAPI | flagUpload},
	{"DELETE GET", "/v1/files/{file_id}", bodyNone, meterNone, flagAnyAPI},
	{"GET", "/v1/files/{file_id}/content", bodyNone, meterNone, flagAnyAPI},
	{"POST", "/v1/fine_tuning/alpha/graders/run", bodyJSON, meterNone, flagNeedsModel},
	{"POST", "/v1/fine_tuning/alpha/graders/validate", bodyJSON, meterNone, 0},
	{"GET POST", "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions", bodyJSON, meterNone, 0},
	{"DELETE", "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions/{permission_id}",
		bodyNone, meterNone, 0},
	{"GET POST", "/v1/fine_tuning/jobs", bodyJSON, meterNone, flagNeedsModel},
	{"GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}", bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", bodyNone, meterNone, 0},
	{"GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", bodyNone, meterNone, 0},
	{"GET", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause", bodyNone, meterNone, 0},
	{"POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume", bodyNone, meterNone, flagNeedsModel},
	{"GET POST", "/v1/messages/batches", bodyJSON, meterNone, flagAnthropic | flagNeedsModel},
	{"DELETE GET", "/v1/messages/batches/{message_batch_id}", bodyNone, meterNone, flagAnthropic},
	{"POST", "/v1/messages/batches/{message_batch_id}/cancel", bodyNone, meterNone, flagAnthropic},
	{"GET", "/v1/messages/batches/{message_batch_id}/results", bodyNone, meterNone, flagAnthropic},
	{"DELETE", "/v1/models/{model}", bodyNone, meterNone, flagModelInPath},
	{"POST", "/v1/realtime/calls", bodyRaw, meterNone, flagNeedsModel},
	{"POST", "/v1/realtime/calls/{call_id}/accept", bodyJSON, meterNone, flagNeedsModel},
	{"POST", "/v1/realtime/calls/{call_id}/hangup", bodyNone, meterNone, 0},
	{"POST", "/v1/realtime/calls/{call_id}/refer", bodyJSON, meterNone, 0},
	{"POST", "/v1/realtime/calls/{call_id}/reject", bodyJSON, meterNone, 0},
	{"DELETE GET", "/v1/responses/{response_id}", bodyNone, meterNone, 0},
	{"POST", "/v1/responses/{response_id}/cancel", bodyNone, meterNone, 0},
	{"GET", "/v1/responses/{response_id}/input_items", bodyNone, meterNone, 0},
	{"GET POST", "/v1/skills", bodyJSONOrForm, meterNone, flagAnyAPI | flagUpload},
	{"DELETE GET POST", "/v1/skills/{skill_id}", bodyJSON, meterNone, flagAnyAPI},
	{"GET", "/v1/skills/{skill_id}/content", bodyNone, meterNone, flagAnyAPI},
	{"GET POST", "/v1/skills/{skill_id}/versions", bodyJSONOrForm, meterNone, flagAnyAPI | flagUpload},
	{"DELETE GET", "/v1/skills/{skill_id}/versions/{version}", bodyNone, meterNone, flagAnyAPI},
	{"GET", "/v1/skills/{skill_id}/versions/{version}/content", bodyNone, meterNone, flagAnyAPI},
	{"POST", "/v1/threads", bodyJSON, meterNone, 0},
	{"POST", "/v1/threads/runs", bodyJSON, meterOpenAI, flagNeedsModel},
	{"DELETE GET POST", "/v1/threads/{thread_id}", bodyJSON, meterNone, 0},
	{"GET POST", "/v1/threads/{thread_id}/messages", bodyJSON, meterNone, 0},
	{"DELETE GET POST", "/v1/threads/{thread_id}/messages/{message_id}", bodyJSON, meterNone, 0},
	{"GET POST", "/v1/threads/{thread_id}/runs", bodyJSON, meterOpenAI, flagNeedsModel},
	{"GET POST", "/v1/threads/{thread_id}/runs/{run_id}", bodyJSON, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/runs/{run_id}/cancel", bodyNone, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/runs/{run_id}/steps", bodyNone, meterNone, 0},
	{"GET", "/v1/threads/{thread_id}/runs/{run_id}/steps/{step_id}", bodyNone, meterNone, 0},
	{"POST", "/v1/threads/{thread_id}/runs/{run_id}/submit_tool_outputs", bodyJSON, meterOpenAI, flagNeedsModel},
	{"POST", "/v1/uploads", bodyJSON, meterNone, 0},
	{"POST", "/v1/uploads/{upload_id}/cancel", bodyNone, meterNone, 0},
	{"POST", "/v1/uploads/{upload_id}/complete", bodyJSON, meterNone, 0},
	{"POST", "/v1/uploads/{upload_id}/parts", bodyForm, meterNone, flagUpload},
	{"GET POST", "/v1/vector_stores", bodyJSON, meterNone, 0},
	{"DELETE GET POST", "/v1/vector_stores/{vector_store_id}", bodyJSON, meterNone, 0},
	{"POST", "/v1/vector_stores/{vector_store_id}/file_batches", bodyJSON, meterNone, 0},
	{"GET", "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}", bodyNone, meterNone, 0},
	{"POST", "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}/cancel", bodyNone, meterNone, 0},
	{"GET", "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}/files", bodyNone, meterNone, 0},
	{"GET POST", "/v1/vector_stores/{vector_store_id}/files", bodyJSON, meterNone, 0},
	{"DELETE GET POST", "/v1/vector_stores/{vector_store_id}/files/{file_id}", bodyJSON, meterNone, 0},
	{"GET", "/v1/vector_stores/{vector_store_id}/files/{file_id}/content", bodyNone, meterNone, 0},
	{"POST", "/v1/vector_stores/{vector_store_id}/search", bodyJSON, meterNone, 0},
	{"GET POST", "/v1/videos", bodyJSONOrForm, meterNone, flagNeedsModel | flagUpload},
	{"POST", "/v1/videos/characters", bodyForm, meterNone, flagUpload},
	{"GET", "/v1/videos/characters/{character_id}", bodyNone, meterNone, 0},
	{"POST", "/v1/videos/edits", bodyJSONOrForm, meterNone, flagNeedsModel | flagUpload},
	{"POST", "/v1/videos/extensions", bodyJSONOrForm, meterNone, flagNeedsModel | flagUpload},
	{"DELETE GET", "/v1/videos/{video_id}", bodyNone, meterNone, 0},
	{"GET", "/v1/videos/{video_id}/content", bodyNone, meterNone, 0},
	{"POST", "/v1/videos/{video_id}/remix", bodyJSONOrForm, meterNone, flagNeedsModel | flagUpload},
	{"POST", "/v1beta/interactions", bodyJSON, meterGemini, flagNeedsModel},
	{"DELETE GET", "/v1beta/interactions/{interaction_id}", bodyNone, meterNone, 0},
	{"POST", "/v1beta/interactions/{interaction_id}/cancel", bodyNone, meterNone, 0},
}

var (
	errNoEndpoint  = errors.New("no such endpoint")                          // 404
	errWrongMethod = errors.New("the endpoint does not support this method") // 405
)

const (
	chatPattern = "/v1/chat/completions"
	listPattern = "/v1/models"
	onePattern  = "/v1/models/{model}"
	modelPrefix = "/v1/models/"

	geminiPrefix      = "/v1beta/" // of every path of Gemini's API
	geminiModelPrefix = geminiPrefix + "models/"
)

// isAPIPath reports whether a path is one of the APIs that the proxy forwards.
func isAPIPath(path string) bool {
	return strings.HasPrefix(path, "/v1/") || strings.HasPrefix(path, geminiPrefix)
}

// hasModelPrefix reports whether a path contains the name of a model.
func hasModelPrefix(path string) bool {
	return strings.HasPrefix(path, modelPrefix) || strings.HasPrefix(path, geminiModelPrefix)
}

// An endpointTable finds endpoints. It is immutable.
type endpointTable struct {
	static       map[string]*methodSet // by pattern, for those without an id
	root         pathNode              // all patterns but those with a model, by segment
	list         []*endpoint
	modelMethods methodSet             // /v1/models/{model}, where the model may contain slashes
	gemini       map[string]*methodSet // /v1beta/models/{model}, by what follows the model, such as ":countTokens"
}

// A methodSet has all methods of one pattern.
type methodSet struct {
	endpoints []*endpoint
	allow     string // "DELETE, GET", for the Allow header
}

type pathNode struct {
	segment    string // the literal segment; "" for an id
	allowColon bool   // the id may contain ':', as in fine-tuned models: ft:gpt-4o:org::id
	literals   map[string]*pathNode
	param      *pathNode
	methods    methodSet
}

// An endpointMatch is the endpoint that a request matched.
type endpointMatch struct {
	endpoint *endpoint
	path     string // for the provider, escaped
	model    string // from the path, decoded; "" unless endpoint.modelInPath
	allow    string // the methods that exist; set with errWrongMethod only
}

func newEndpointTable() *endpointTable {
	t := &endpointTable{static: make(map[string]*methodSet), gemini: make(map[string]*methodSet)}
	t.add(classInference, inferenceEndpoints)
	t.add(classStateful, statefulEndpoints)
	return t
}

func (t *endpointTable) add(class endpointClass, rows []endpointRow) {
	for _, r := range rows {
		for method := range strings.FieldsSeq(r.methods) {
			e := &endpoint{method: method, pattern: r.pattern, label: method + " " + r.pattern, class: class,
				modelInPath: r.flags&flagModelInPath != 0}
			if method == "POST" {
				e.body, e.meter = r.body, r.meter
				e.needsModel, e.addUsage = r.flags&flagNeedsModel != 0, r.flags&flagAddUsage != 0
				e.upload = r.flags&flagUpload != 0
			}
			switch {
			case r.flags&flagAnthropic != 0:
				e.api = apiAnthropic
			case r.flags&flagAnyAPI != 0:
				e.api = apiAny
			case strings.HasPrefix(r.pattern, geminiPrefix):
				e.api = apiGemini
			}
			t.list = append(t.list, e)
			if e.modelInPath {
				t.methodsOfModel(e.pattern).add(e)
				continue
			}
			n := t.root.findOrAdd(e.pattern)
			n.methods.add(e)
			if !strings.Contains(e.pattern, "{") {
				t.static[e.pattern] = &n.methods
			}
		}
	}
}

// methodsOfModel returns the methods of a pattern with a model.
func (t *endpointTable) methodsOfModel(pattern string) *methodSet {
	verb, ok := strings.CutPrefix(pattern, geminiModelPrefix+"{model}")
	if !ok {
		return &t.modelMethods
	}
	if t.gemini[verb] == nil {
		t.gemini[verb] = &methodSet{}
	}
	return t.gemini[verb]
}

// all returns every endpoint, in the order of the tables.
func (t *endpointTable) all() []*endpoint { return t.list }

// findOrAdd returns the node of a pattern and adds the nodes that are missing on the way.
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

func (s *methodSet) add(e *endpoint) {
	s.endpoints = append(s.endpoints, e)
	if s.allow != "" {
		s.allow += ", "
	}
	if s.allow += e.method; e.method == "GET" {
		s.allow += ", HEAD"
	}
}

// forMethod returns the match for a method. path is the outbound path. A HEAD is a GET whose body nobody wants, and
// matches the same endpoint.
func (s *methodSet) forMethod(method, path, model string) (endpointMatch, error) {
	if method == "HEAD" {
		method = "GET"
	}
	for _, e := range s.endpoints {
		if e.method == method {
			return endpointMatch{endpoint: e, path: path, model: model}, nil
		}
	}
	if len(s.endpoints) == 0 {
		return endpointMatch{}, errNoEndpoint
	}
	return endpointMatch{allow: s.allow}, errWrongMethod
}

// match finds the endpoint of a request. u is from its request line; host and query are ignored. The error is
// errNoEndpoint, or errWrongMethod with endpointMatch.allow. A path may have no escapes (except in a model's
// name), no dot or empty segments and no trailing slash. A literal segment always wins over an id:
// /v1/responses/compact is never the response "compact", whatever the method.
func (t *endpointTable) match(method string, u *url.URL) (endpointMatch, error) {
	escaped := u.EscapedPath()
	if s := t.static[escaped]; s != nil {
		return s.forMethod(method, s.endpoints[0].pattern, "")
	}
	if rest, ok := strings.CutPrefix(escaped, modelPrefix); ok {
		path, model, ok := parseModelPath(rest)
		if !ok {
			return endpointMatch{}, errNoEndpoint
		}
		return t.modelMethods.forMethod(method, path, model)
	}
	if rest, ok := strings.CutPrefix(escaped, geminiModelPrefix); ok {
		return t.matchGemini(method, rest)
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

// matchGemini is match for what follows /v1beta/models/: the model, and after a colon what to do with it. The model's
// name has no colon and no slash, escaped or not: a server that unescapes the path first would find another method.
func (t *endpointTable) matchGemini(method, rest string) (endpointMatch, error) {
	name, verb := rest, ""
	if i := strings.IndexByte(rest, ':'); i >= 0 {
		name, verb = rest[:i], rest[i:]
	}
	s := t.gemini[verb]
	_, model, ok := parseModelPath(name)
	if s == nil || !ok || strings.ContainsAny(model, ":/") {
		return endpointMatch{}, errNoEndpoint
	}
	return s.forMethod(method, geminiModelPrefix+rest, model)
}

// isValidID reports whether s is 1 to 128 letters, digits and "_-.", and cannot be read as a dot segment.
func isValidID(s string, allowColon bool) bool {
	extra := "_-."
	if allowColon {
		extra = "_-.:"
	}
	return s != "" && len(s) <= 128 && s[0] != '.' && !strings.Contains(s, "..") && isAlphanumericOr(s, extra)
}

// parseModelPath reads the escaped path after /v1/models/ and returns the outbound path and the model's name.
// The outbound path has the client's bytes. Each segment is unescaped once; a '%' that remains is refused, so that a
// later decoder cannot find another name in it.
func parseModelPath(rest string) (path, model string, ok bool) {
	if len(rest) > 3*maxModelLen {
		return "", "", false
	}
	path = modelPrefix[:len(modelPrefix)-1]
	for segment := range strings.SplitSeq(rest, "/") {
		plain, err := url.PathUnescape(segment)
		if err != nil || strings.Contains(segment, ";") { // some servers cut a segment off there
			return "", "", false
		}
		path += "/" + segment
		model += "/" + plain
	}
	model = model[1:]
	if len(model) > maxModelLen || !utf8.ValidString(model) || strings.ContainsFunc(model, isUnsafeInPath) {
		return "", "", false
	}
	for segment := range strings.SplitSeq(model, "/") {
		if segment == "" || segment == "." || strings.Contains(segment, "..") {
			return "", "", false
		}
	}
	return path, model, true
}

// isUnsafeInPath reports whether no model's name in a path may have r: a second decoder, or one that takes \ for /,
// could read another path.
func isUnsafeInPath(r rune) bool {
	return r == '%' || r == '\\' || r == utf8.RuneError || unicode.IsControl(r)
}

// pathForModel returns the outbound path for another model than the client's, which path has.
func (e *endpoint) pathForModel(model, path string) string {
	if e.api == apiGemini {
		return strings.Replace(e.pattern, "{model}", strings.ReplaceAll(url.PathEscape(model), ":", "%3A"), 1)
	}
	return modelOutboundPath(model, path)
}

// modelOutboundPath returns the outbound path of a model, or path if no path can hold the model's name.
func modelOutboundPath(name, path string) string {
	if p, _, ok := parseModelPath(strings.ReplaceAll(url.PathEscape(name), "%2F", "/")); ok {
		return p
	}
	return path
}

// hasEndMarker reports whether a complete stream of this endpoint ends with a marker.
func (e *endpoint) hasEndMarker() bool {
	switch e.pattern {
	case "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", interactionsPattern:
		return true
	}
	return e.streams()
}

// streams reports whether the endpoint's answers are always streams.
func (e *endpoint) streams() bool { return strings.HasSuffix(e.pattern, ":streamGenerateContent") }

// eventForm returns how streams of the endpoint write errors.
func (e *endpoint) eventForm() eventForm {
	switch {
	case e.api == apiAnthropic:
		return eventsAnthropic
	case e.api == apiGemini && e.modelInPath:
		return eventsGemini
	case e.pattern == chatPattern || e.pattern == "/v1/completions":
		return eventsUnnamed
	case strings.HasPrefix(e.pattern, "/v1/responses"):
		return eventsResponses
	}
	return eventsNamed
}

// mayBeGoogles reports whether the endpoint, of the other APIs, shows Google's models where a project has no others.
func (e *endpoint) mayBeGoogles() bool {
	return e.method == "GET" && (e.pattern == listPattern || e.pattern == onePattern)
}

// listsModels reports whether the endpoint's answer is a list of models.
func (e *endpoint) listsModels() bool {
	return e.pattern == listPattern || e.pattern == geminiPrefix+"models"
}

// isAboutModel reports whether the endpoint shows or deletes a model, and does not run it.
func (e *endpoint) isAboutModel() bool { return e.modelInPath && !e.needsModel }

// The endpoints of objects that are made by running a model, and stored: OpenAI's responses, Gemini's interactions.
const (
	responsesPattern    = "/v1/responses"
	interactionsPattern = geminiPrefix + "interactions"
)

// makesResponse reports whether an answer of the endpoint is a new response that may be stored.
func (e *endpoint) makesResponse() bool {
	return e.pattern == responsesPattern || e.pattern == interactionsPattern
}

// showsResponse reports whether an answer of the endpoint shows a stored response, or says that it was deleted.
func (e *endpoint) showsResponse() bool {
	switch e.pattern {
	case responsesPattern + "/{response_id}", responsesPattern + "/{response_id}/cancel",
		interactionsPattern + "/{interaction_id}", interactionsPattern + "/{interaction_id}/cancel":
		return true
	}
	return false
}

// responseID returns the id in the path of an endpoint that shows a stored response.
func responseID(path string) string {
	path = strings.TrimPrefix(strings.TrimPrefix(path, responsesPattern+"/"), interactionsPattern+"/")
	id, _, _ := strings.Cut(path, "/")
	return id
}

// parseAPIFamily reads the name of an API family.
func parseAPIFamily(name string) (apiFamily, error) {
	switch name {
	case "openai":
		return apiOpenAI, nil
	case "anthropic":
		return apiAnthropic, nil
	case "gemini":
		return apiGemini, nil
	}
	return 0, &fieldError{"api", "must be openai, anthropic or gemini"}
}

// hasOutputTokens reports whether answers of the endpoint have output tokens.
func (e *endpoint) hasOutputTokens() bool {
	return e.meter != meterNone && e.meter != meterEmbeddings && e.pattern != "/v1/audio/speech"
}

// completeUsage completes what a meter read with what the endpoint and the request say of it: speech is sound and
// images are pictures, also where the answer does not say so; and models that are billed by the character or by the
// picture have answers without usage. p is the price of the model, nil if it has none; host is the upstream's, which
// says in which region it is.
func (e *endpoint) completeUsage(row *requestRow, m *meter, f *callFields, p *price, host string) {
	speech, images := e.pattern == "/v1/audio/speech", strings.HasPrefix(e.pattern, "/v1/images/")
	d := &row.details
	switch {
	case m.hasUsage && speech && !m.usage.hasOutputDetails():
		row.counts.audioOutput = row.counts.output
	case m.hasUsage && images && !m.usage.hasOutputDetails():
		d.imageOutput = row.counts.output
	case m.hasUsage || m.failed || p == nil:
	case speech && p.rates[kindInputCharacter] >= 0:
		row.counts, row.source, d.characters = tokenCounts{}, usageExact, f.characters
	case images && m.done && p.rates[kindOutputPicture] >= 0:
		list := &m.scan.pictures
		row.counts, row.source, d.outputPictures = tokenCounts{}, usageExact, cmp.Or(list.count, max(1, f.n))
		row.pictureSize, row.pictureQuality = cmp.Or(list.size, f.size), cmp.Or(list.quality, f.quality)
	}
	d.region = cmp.Or(d.region, hostRegion(host))
	unknownSession := d.codeSessions > 0 && (f.sizedContainer || f.statefulParam != "") // it may have begun earlier
	if unknownSession || p != nil && d.webSearches > 0 && f.plainSearch && p.isPreviewSearch() {
		row.source = usageEstimated
	}
	if e.api == apiGemini && m.hasUsage && f.tools[toolWebSearch] && (f.tools[toolUncounted] || !m.countsSearches()) {
		d.webSearches, row.source = max(1, d.webSearches), usageEstimated
	}
	if e.pattern == chatPattern && m.hasUsage && d.webSearches == 0 && alwaysSearches(row.model) {
		d.webSearches = 1
		if d.searchContext == searchContextUnknown && p != nil && p.rates[kindWebSearch] < 0 {
			d.searchContext = searchContextLow
		}
	}
}

// isPreviewSearch reports whether the price of a web search is that of the tool web_search_preview with a model that
// does not reason. The tool web_search costs less, but its results count as input.
func (p *price) isPreviewSearch() bool {
	const plain = 10_000_000_000 // pico-dollars
	return (p.from.Provider == "openai" || p.from.Provider == "azure") && p.rates[kindWebSearch] > plain
}

// alwaysSearches reports whether a model searches the web once in each call of /v1/chat/completions, and bills that.
func alwaysSearches(model string) bool {
	model = model[strings.LastIndexByte(model, '/')+1:]
	return strings.Contains(model, "-search-preview") || strings.Contains(model, "-search-api") ||
		strings.HasPrefix(model, "sonar") && !strings.HasPrefix(model, "sonar-deep")
}

// toolCounts are how often an answer used the tools that a provider bills by the call.
type toolCounts struct {
	webSearches, fileSearches, codeSessions, imageCalls int64
	containers                                          [8]uint32 // that the sessions ran in
}

// An outputItem is what matters of an item in a response's output.
type outputItem struct {
	tool      string // the item's type, if it is a tool's
	action    string // "other" if a web search only opened a page or looked for text in it
	container uint32 // a hash of the id of the container, 0 if there is none
}

// set stores a member of the item.
func (i *outputItem) set(s slot, text []byte) {
	switch s {
	case slotItemType:
		for _, tool := range [...]string{"web_search_call", "file_search_call", "code_interpreter_call",
			"image_generation_call"} {
			if string(text) == tool {
				i.tool = tool
			}
		}
	case slotActionType:
		i.action = "other"
		if string(text) == "search" {
			i.action = ""
		}
	case slotContainer:
		h := fnv.New32a()
		h.Write(text)
		i.container = max(h.Sum32(), 1)
	}
}

// add counts an item. Calls that run in one container are one session.
func (t *toolCounts) add(i *outputItem) {
	switch i.tool {
	case "web_search_call":
		if i.action == "" {
			t.webSearches++
		}
	case "file_search_call":
		t.fileSearches++
	case "image_generation_call":
		t.imageCalls++
	case "code_interpreter_call":
		n := min(int(t.codeSessions), len(t.containers))
		if i.container != 0 && slices.Contains(t.containers[:n], i.container) {
			return
		}
		if n < len(t.containers) {
			t.containers[n] = i.container
		}
		t.codeSessions++
	}
}
