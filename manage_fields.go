// This file declares what administrators may send: the inputs of the operations, and a table of the fields
// of each. A field is declared once. Its row in the table has its name in JSON, in forms and in errors, the
// text and kind of its form input, whether null is allowed, its rule, and where its value goes.
//
// The tables drive the decoding of JSON bodies (decodeFields) and of forms (fieldTargets), the inputs of forms
// (formFields in admin_forms.go) and validation (applyFields); a test compares openapi.yaml with them. They are
// made once, in newFieldTables, and do not change. The filters of lists are at the end.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A field is one value of an input I, for an object with the row R.
type field[I, R any] struct {
	name       string
	nullable   bool // null is a value of its own, such as "never"
	resettable bool // null resets it, in a change
	createOnly bool // a change cannot have it

	// How forms present it; see formField.
	label, kind, placeholder, help string
	required                       bool
	empty                          emptyField

	target func(*I) inputField // its optional
	apply  func(*I, *R) error  // checks the value and stores it in the row; nil: the input's apply does both
}

// An inputField is an optional of any type.
type inputField interface{ unreadable() error }

// An emptyField is the meaning of an empty form field.
type emptyField int

const (
	emptyValue   emptyField = iota // the empty text, list or map, or the number 0
	emptyOmitted                   // the operation's default, or no change
	emptyNull
)

// fieldTables are the tables of the fields of all inputs.
type fieldTables struct {
	token    []field[tokenInput, tokenRow]
	rotate   []field[rotateInput, int64] // of the overlap in minutes
	key      []field[keyInput, managementKeyRow]
	project  []field[projectInput, projectRow]
	upstream []field[upstreamInput, upstreamEdit]
	price    []field[priceInput, priceRow]
	webhook  []field[webhookInput, webhookEdit]
}

func newFieldTables() fieldTables {
	return fieldTables{
		token: tokenFields(), rotate: rotateFields(), key: keyFields(), project: projectFields(),
		upstream: upstreamFields(), price: priceFields(), webhook: webhookFields(),
	}
}

// given is an optional with a value.
func given[T any](value T) optional[T] { return optional[T]{set: true, value: value} }

// stored completes a field whose value goes into a column as it is, if it follows the rule. at returns the value in
// the input, and the column in the row.
func stored[I, R, T any](
	f field[I, R], rule func(name string, value T) error, at func(*I, *R) (*optional[T], *T),
) field[I, R] {
	return converted(f, rule, at, func(value T) T { return value })
}

// storedOrNull completes a field with a whole number of units. Null clears its column.
func storedOrNull[I, R any](
	f field[I, R], unit int64, rule func(string, int64) error, at func(*I, *R) (*optional[int64], **int64),
) field[I, R] {
	f.nullable = true
	return converted(f, rule, at, func(value int64) *int64 { return new(value * unit) })
}

// converted is stored for a column of another type.
func converted[I, R, T, C any](
	f field[I, R], rule func(string, T) error, at func(*I, *R) (*optional[T], *C), convert func(T) C,
) field[I, R] {
	f.target = func(in *I) inputField { from, _ := at(in, new(R)); return from }
	f.apply = func(in *I, row *R) error {
		from, column := at(in, row)
		switch {
		case from.null && f.nullable:
			*column = *new(C)
			return nil
		case !from.hasValue():
			return nil
		}
		if err := rule(f.name, from.value); err != nil {
			return err
		}
		*column = convert(from.value)
		return nil
	}
	return f
}

// fieldTargets returns the pointers to the optionals of an input, by name.
func fieldTargets[I, R any](in *I, fields []field[I, R]) map[string]any {
	targets := map[string]any{}
	for _, f := range fields {
		targets[f.name] = f.target(in)
	}
	return targets
}

// decodeFields reads the JSON body of a request that creates or changes an object.
func decodeFields[I, R any](body []byte, in *I, fields []field[I, R], isNew bool) error {
	targets := fieldTargets(in, fields)
	var nullable []string
	for _, f := range fields {
		if f.createOnly && !isNew {
			delete(targets, f.name)
		}
		if f.nullable || f.resettable && !isNew {
			nullable = append(nullable, f.name)
		}
	}
	return decodeObject(body, targets, nullable...)
}

// applyFields checks the values that were sent and stores them in the row. The error has the mistakes of all fields:
// a form shows all of them, a JSON response the first.
func applyFields[I, R any](in *I, row *R, fields []field[I, R]) error {
	var mistakes []error
	for _, f := range fields {
		if err := f.target(in).unreadable(); err != nil {
			mistakes = append(mistakes, err)
		} else if f.apply != nil {
			mistakes = append(mistakes, f.apply(in, row))
		}
	}
	return errors.Join(mistakes...)
}

func anyName(_, value string) error { return validateName(value) }

func anyValue[T any](string, T) error { return nil }

// oneOf is the rule for a text that has few values.
func oneOf(values ...string) func(string, string) error {
	return func(name, value string) error {
		if !slices.Contains(values, value) {
			return &fieldError{name, "must be " + joinChoices(values)}
		}
		return nil
	}
}

// within is the rule for a whole number, with what it must be.
func within(from, to int64, must string) func(string, int64) error {
	return func(name string, n int64) error {
		if n < from || n > to {
			return &fieldError{name, must}
		}
		return nil
	}
}

func inRange(from, to int64) func(string, int64) error {
	return within(from, to, fmt.Sprintf("must be from %d to %d", from, to))
}

// zeroOrInRange is the rule for a whole number for which 0 means the default.
func zeroOrInRange(from, to int64) func(string, int64) error {
	rule := within(from, to, fmt.Sprintf("must be 0 or from %d to %d", from, to))
	return func(name string, n int64) error {
		if n == 0 {
			return nil
		}
		return rule(name, n)
	}
}

// objectOrEmpty returns the object that was sent, or an empty one for null.
func objectOrEmpty(p optional[json.RawMessage]) []byte {
	if p.null {
		return []byte("{}")
	}
	return p.value
}

// maxLifetime bounds lifetimes. A null expires_at means never.
const maxLifetime = 100 * 365 * 24 * time.Hour

// parseFutureTime parses an RFC 3339 time after now. It returns nil, which is never, for null.
func parseFutureTime(name string, in optional[string], now time.Time) (*int64, error) {
	if !in.hasValue() {
		return nil, nil
	}
	t, err := time.Parse(time.RFC3339, in.value)
	if err != nil {
		return nil, &fieldError{name, "must be a time such as 2027-01-31T00:00:00Z, or null for never"}
	}
	if !t.After(now) || t.Sub(now) > maxLifetime {
		return nil, &fieldError{name, "must be in the future and within 100 years"}
	}
	return new(t.UnixMilli()), nil
}

// A tokenInput is what can be sent about a token. At most one of minutes, hours, days and expiresAt is set.
type tokenInput struct {
	projectID, name          optional[string]
	minutes, hours, days     optional[int64]
	expiresAt                optional[string]
	idleMinutes, maxRequests optional[int64]
	policy                   optional[json.RawMessage]
}

func tokenFields() []field[tokenInput, tokenRow] {
	type f = field[tokenInput, tokenRow]
	return []f{
		{name: "project_id", createOnly: true, label: "Project", kind: "select", required: true,
			target: func(in *tokenInput) inputField { return &in.projectID }},
		stored(f{name: "name", label: "Name", required: true, help: "token-name"}, anyName,
			func(in *tokenInput, t *tokenRow) (*optional[string], *string) { return &in.name, &t.name }),
		{name: "duration_minutes", target: func(in *tokenInput) inputField { return &in.minutes }},
		{name: "duration_hours", target: func(in *tokenInput) inputField { return &in.hours }},
		{name: "expires_in_days", target: func(in *tokenInput) inputField { return &in.days }},
		{name: "expires_at", nullable: true, label: "Expires (UTC)", kind: "datetime-local", empty: emptyNull,
			help: "expiry", target: func(in *tokenInput) inputField { return &in.expiresAt }},
		storedOrNull(f{name: "max_requests", label: "Maximum calls", kind: "number", empty: emptyNull,
			help: "max-requests"}, 1, within(0, math.MaxInt64/2, "must be 0 (none) or more, or null (unlimited)"),
			func(in *tokenInput, t *tokenRow) (*optional[int64], **int64) { return &in.maxRequests, &t.maxRequests }),
		storedOrNull(f{name: "idle_expiry_minutes", label: "Expires when idle (minutes)", kind: "number",
			empty: emptyNull, help: "idle-expiry"}, time.Minute.Milliseconds(),
			within(1, int64(maxLifetime/time.Minute), "must be at least 1 and at most 100 years, or null"),
			func(in *tokenInput, t *tokenRow) (*optional[int64], **int64) { return &in.idleMinutes, &t.idleExpiry }),
		{name: "policy", nullable: true, target: func(in *tokenInput) inputField { return &in.policy },
			apply: func(in *tokenInput, t *tokenRow) error { return applyPolicy(in.policy, false, &t.policy) }},
	}
}

// apply checks the input and stores it in the row.
func (in *tokenInput) apply(tables *fieldTables, t *tokenRow, now time.Time) error {
	return errors.Join(applyFields(in, t, tables.token), in.applyExpiry(t, now))
}

// applyExpiry sets when the token expires, if the input has a field for it.
func (in *tokenInput) applyExpiry(t *tokenRow, now time.Time) (err error) {
	ways := 0
	for _, l := range []struct {
		name     string
		duration optional[int64]
		unit     time.Duration
	}{
		{"duration_minutes", in.minutes, time.Minute},
		{"duration_hours", in.hours, time.Hour},
		{"expires_in_days", in.days, 24 * time.Hour},
	} {
		if !l.duration.set {
			continue
		}
		ways++
		if l.duration.value < 1 || l.duration.value > int64(maxLifetime/l.unit) {
			return &fieldError{l.name, "must be at least 1 and at most 100 years"}
		}
		t.expiresAt = new(now.Add(time.Duration(l.duration.value) * l.unit).UnixMilli())
	}
	if in.expiresAt.set {
		ways++
		if t.expiresAt, err = parseFutureTime("expires_at", in.expiresAt, now); err != nil {
			return err
		}
	}
	if ways > 1 {
		return &fieldError{"expires_at", "and duration_minutes, duration_hours, expires_in_days cannot be combined"}
	}
	return nil
}

// applyPolicy stores a policy in the form that the program writes; null is the empty policy.
func applyPolicy(in optional[json.RawMessage], ofProject bool, column *string) error {
	if !in.set {
		return nil
	}
	p, err := parsePolicy(objectOrEmpty(in), ofProject)
	if err == nil {
		*column = p.String()
	}
	return err
}

// A rotateInput sets for how long the previous value of a rotated token stays valid.
type rotateInput struct{ overlapMinutes optional[int64] }

const (
	defaultOverlapMinutes = 60
	maxOverlapMinutes     = 30 * 24 * 60
)

func rotateFields() []field[rotateInput, int64] {
	type f = field[rotateInput, int64]
	return []f{stored(f{name: "overlap_minutes", label: "Keep the old value valid for", kind: "select", required: true},
		inRange(0, maxOverlapMinutes),
		func(in *rotateInput, minutes *int64) (*optional[int64], *int64) { return &in.overlapMinutes, minutes })}
}

// A keyInput is what can be sent about a management key.
type keyInput struct{ name, role, expiresAt optional[string] }

func keyFields() []field[keyInput, managementKeyRow] {
	type f = field[keyInput, managementKeyRow]
	return []f{
		stored(f{name: "name", label: "Name", required: true, help: "key-name"}, anyName,
			func(in *keyInput, k *managementKeyRow) (*optional[string], *string) { return &in.name, &k.name }),
		stored(f{name: "role", label: "Role", kind: "select", required: true, help: "role"},
			oneOf(string(roleViewer), string(roleOperator), string(roleAdmin)),
			func(in *keyInput, k *managementKeyRow) (*optional[string], *string) { return &in.role, &k.role }),
		{name: "expires_at", nullable: true, label: "Expires (UTC)", kind: "datetime-local", empty: emptyNull,
			help: "expiry", target: func(in *keyInput) inputField { return &in.expiresAt }},
	}
}

// apply checks the input and stores it in the row.
func (in *keyInput) apply(tables *fieldTables, k *managementKeyRow, now time.Time) (err error) {
	if in.expiresAt.set {
		k.expiresAt, err = parseFutureTime("expires_at", in.expiresAt, now)
	}
	return errors.Join(applyFields(in, k, tables.key), err)
}

// A projectInput is what can be sent about a project. The provider, base URL and keys are those of the first
// upstream of a new project.
type projectInput struct {
	name, provider, baseURL optional[string]
	key, openaiKey          optional[secret]
	active                  optional[bool]
	policy, routing         optional[json.RawMessage]
	costMultiplier          optional[json.RawMessage]
	upstreams               []upstreamInput // of a new project; only the pages send them
}

func projectFields() []field[projectInput, projectRow] {
	type f = field[projectInput, projectRow]
	return []f{
		stored(f{name: "name", label: "Name", required: true, help: "project-name"}, anyName,
			func(in *projectInput, p *projectRow) (*optional[string], *string) { return &in.name, &p.name }),
		{name: "provider", createOnly: true, label: "Provider", kind: "select", required: true,
			target: func(in *projectInput) inputField { return &in.provider }},
		{name: "api_key", createOnly: true, label: "API key", kind: "password", empty: emptyOmitted,
			help: "first-api-key", target: func(in *projectInput) inputField { return &in.key }},
		{name: "openai_api_key", createOnly: true, target: func(in *projectInput) inputField { return &in.openaiKey }},
		{name: "base_url", createOnly: true, label: "Base URL", placeholder: "https://", empty: emptyOmitted,
			help: "base-url", target: func(in *projectInput) inputField { return &in.baseURL }},
		stored(f{name: "is_active"}, anyValue,
			func(in *projectInput, p *projectRow) (*optional[bool], *bool) { return &in.active, &p.active }),
		{name: "policy", resettable: true, target: func(in *projectInput) inputField { return &in.policy },
			apply: func(in *projectInput, p *projectRow) error { return applyPolicy(in.policy, true, &p.policy) }},
		{name: "routing", resettable: true, target: func(in *projectInput) inputField { return &in.routing },
			apply: (*projectInput).applyRouting},
		{name: "cost_multiplier", nullable: true, label: "Cost multiplier", kind: "number", empty: emptyNull,
			help: "cost-multiplier", target: func(in *projectInput) inputField { return &in.costMultiplier },
			apply: func(in *projectInput, p *projectRow) error {
				return applyMultiplier(in.costMultiplier, &p.costMultiplier)
			}},
	}
}

// applyMultiplier stores by what costs are multiplied, in ten-thousandths; null is 1.
func applyMultiplier(in optional[json.RawMessage], ten4 *int64) error {
	switch n, err := parseDecimal(amountText(in), 4, 100); {
	case !in.set:
	case in.null:
		*ten4 = multiplierOne
	case err != nil || n == 0:
		return &fieldError{"cost_multiplier", "must be a number from 0.0001 to 100 with at most 4 decimals"}
	default:
		*ten4 = n
	}
	return nil
}

func (in *projectInput) applyRouting(p *projectRow) error {
	if !in.routing.set {
		return nil
	}
	parsed, err := parseRouting(objectOrEmpty(in.routing))
	if err == nil {
		p.routing = parsed.String()
	}
	return err
}

// An upstreamInput is what can be sent about an upstream.
type upstreamInput struct {
	name, provider, baseURL, organization, openaiProject, note optional[string]
	key                                                        optional[secret]
	weight, priority, requestsPerMinute, tokensPerMinute       optional[int64]
	connectMS, answerMS, firstEventMS, idleMS                  optional[int64]
	models, sharedWith                                         optional[[]string]
	rewrite, costMultiplier                                    optional[json.RawMessage]
	active                                                     optional[bool]
}

// An upstreamEdit is an upstream while it is changed: its row, and its settings decoded.
type upstreamEdit struct {
	upstreamRow
	upstreamSettings
}

func upstreamFields() []field[upstreamInput, upstreamEdit] {
	type (
		f     = field[upstreamInput, upstreamEdit]
		input = upstreamInput
		edit  = upstreamEdit
	)
	return slices.Concat([]f{
		stored(f{name: "name", label: "Name", required: true, help: "upstream-name"}, anyName,
			func(in *input, u *edit) (*optional[string], *string) { return &in.name, &u.name }),
		{name: "provider", label: "Provider", kind: "select", required: true,
			target: func(in *input) inputField { return &in.provider }},
		{name: "api_key", label: "API key", kind: "password", empty: emptyOmitted, help: "api-key",
			target: func(in *input) inputField { return &in.key }},
		{name: "base_url", label: "Base URL", placeholder: "https://", empty: emptyOmitted, help: "base-url",
			target: func(in *input) inputField { return &in.baseURL }},
		stored(f{name: "is_active", label: "Active", kind: "checkbox", help: "is-active"}, anyValue,
			func(in *input, u *edit) (*optional[bool], *bool) { return &in.active, &u.active }),
		{name: "models", label: "Models", kind: "lines", placeholder: "gpt-4o*", help: "upstream-models",
			target: func(in *input) inputField { return &in.models }, apply: (*input).applyModels},
		stored(f{name: "priority", label: "Priority", kind: "number", required: true, empty: emptyOmitted,
			help: "priority"}, inRange(0, 1000),
			func(in *input, u *edit) (*optional[int64], *int64) { return &in.priority, &u.priority }),
		stored(f{name: "weight", label: "Weight", kind: "number", required: true, empty: emptyOmitted,
			help: "weight"}, inRange(0, 1000),
			func(in *input, u *edit) (*optional[int64], *int64) { return &in.weight, &u.weight }),
		{name: "rewrite", label: "Model name mapping", kind: "pairs", placeholder: "gpt-4o = my-deployment",
			help: "rewrite", target: func(in *input) inputField { return &in.rewrite }, apply: (*input).applyRewrite},
	}, upstreamNumberFields(), []f{
		{name: "cost_multiplier", nullable: true, label: "Cost multiplier", kind: "number", empty: emptyNull,
			help: "cost-multiplier", target: func(in *input) inputField { return &in.costMultiplier },
			apply: func(in *input, u *edit) error { return applyMultiplier(in.costMultiplier, &u.CostMultiplier) }},
		{name: "shared_with", label: "Shared with projects", kind: "lines", placeholder: "proj_…",
			help: "shared-with", target: func(in *input) inputField { return &in.sharedWith },
			apply: (*input).applySharing},
		stored(f{name: "note", label: "Note", help: "note"}, validateShortText,
			func(in *input, u *edit) (*optional[string], *string) { return &in.note, &u.Note }),
		stored(f{name: "organization", label: "OpenAI organization", placeholder: "org-…", help: "organization"},
			validateProviderID,
			func(in *input, u *edit) (*optional[string], *string) { return &in.organization, &u.organization }),
		stored(f{name: "openai_project", label: "OpenAI project", placeholder: "proj_…", help: "openai-project"},
			validateProviderID,
			func(in *input, u *edit) (*optional[string], *string) { return &in.openaiProject, &u.openaiProject }),
	})
}

// upstreamNumberFields declares the limits and timeouts of an upstream; 0 is the default.
func upstreamNumberFields() []field[upstreamInput, upstreamEdit] {
	type (
		f     = field[upstreamInput, upstreamEdit]
		input = upstreamInput
		edit  = upstreamEdit
	)
	number := func(
		name, label, help string, least, most int64, at func(*input, *edit) (*optional[int64], *int64),
	) f {
		return stored(f{name: name, label: label, kind: "number", help: help}, zeroOrInRange(least, most), at)
	}
	longest := (2 * time.Hour).Milliseconds()
	return []f{
		number("requests_per_minute", "Requests per minute", "requests-per-minute", 1, 1_000_000_000,
			func(in *input, u *edit) (*optional[int64], *int64) {
				return &in.requestsPerMinute, &u.RequestsPerMinute
			}),
		number("tokens_per_minute", "Tokens per minute", "tokens-per-minute", 1, 1_000_000_000_000,
			func(in *input, u *edit) (*optional[int64], *int64) { return &in.tokensPerMinute, &u.TokensPerMinute }),
		number("connect_ms", "Connect timeout (ms)", "connect-timeout", 100, connectTimeout.Milliseconds(),
			func(in *input, u *edit) (*optional[int64], *int64) { return &in.connectMS, &u.ConnectMS }),
		number("answer_ms", "Response timeout (ms)", "response-timeout", 100, longest,
			func(in *input, u *edit) (*optional[int64], *int64) { return &in.answerMS, &u.AnswerMS }),
		number("first_event_ms", "First event timeout (ms)", "first-event-timeout", 100, longest,
			func(in *input, u *edit) (*optional[int64], *int64) { return &in.firstEventMS, &u.FirstEventMS }),
		number("idle_ms", "Longest pause between events (ms)", "idle-timeout", 100, longest,
			func(in *input, u *edit) (*optional[int64], *int64) { return &in.idleMS, &u.IdleMS }),
	}
}

// apply checks the input and stores it in the row, whose id and projectID are set.
func (in *upstreamInput) apply(ops *operations, row *upstreamRow, isNew bool) error {
	in.name.set = in.name.set || isNew // it is required
	if err := in.applyProvider(row, isNew); err != nil {
		return err
	}
	destinationErr := in.applyDestination(ops, row, isNew)
	edit := upstreamEdit{upstreamRow: *row}
	if err := json.Unmarshal([]byte(row.settings), &edit.upstreamSettings); err != nil {
		return fmt.Errorf("settings of upstream %s: %w", row.id, err)
	}
	if err := errors.Join(destinationErr, applyFields(in, &edit, ops.fields.upstream)); err != nil {
		return err
	}
	*row = edit.upstreamRow
	row.settings = edit.upstreamSettings.String()
	return nil
}

// applyProvider sets the provider of a new upstream.
func (in *upstreamInput) applyProvider(row *upstreamRow, isNew bool) error {
	if !isNew {
		if in.provider.set {
			return &fieldError{"provider", "cannot be changed; create another upstream"}
		}
		return nil
	}
	row.provider = providerOpenAI
	if in.provider.hasValue() {
		row.provider = in.provider.value
	}
	return oneOf(providerOpenAI, providerAnthropic, providerAzure, providerCompatible, providerGoogle)(
		"provider", row.provider)
}

func (in *upstreamInput) applyModels(u *upstreamEdit) error {
	if !in.models.set {
		return nil
	}
	if err := checkPatterns("models", in.models.value); err != nil {
		return err
	}
	u.models = string(mustMarshal(append([]string{}, in.models.value...)))
	return nil
}

func (in *upstreamInput) applyRewrite(u *upstreamEdit) error {
	if !in.rewrite.hasValue() {
		return nil
	}
	names, err := parseRewrite(in.rewrite.value)
	if err == nil {
		u.rewrite = string(mustMarshal(names))
	}
	return err
}

func (in *upstreamInput) applySharing(u *upstreamEdit) error {
	if !in.sharedWith.set {
		return nil
	}
	ids := slices.Compact(slices.Sorted(slices.Values(in.sharedWith.value)))
	if len(ids) > 500 {
		return &fieldError{"shared_with", "must have 500 entries or fewer"}
	}
	u.sharedWith = string(mustMarshal(append([]string{}, ids...)))
	return nil
}

func validateProviderID(name, value string) error {
	if len(value) > 200 || strings.ContainsFunc(value, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return &fieldError{name, "must be an ID of the provider: at most 200 printable ASCII characters"}
	}
	return nil
}

func validateShortText(name, value string) error {
	if len(value) > 500 || strings.ContainsFunc(value, func(c rune) bool { return c < ' ' || c == 0x7f }) {
		return &fieldError{name, "must have at most 500 bytes, without control characters"}
	}
	return nil
}

// withGeminiPath returns a base URL with the path of Gemini's API, if it has none.
func withGeminiPath(s string) string {
	base, err := url.Parse(s)
	if err != nil || base.Host == "" || strings.Trim(base.Path, "/") != "" {
		return s
	}
	return strings.TrimRight(s, "/") + strings.TrimSuffix(geminiPrefix, "/")
}

// A listQuery is the size of a page and the row after which it starts.
type listQuery struct {
	limit int
	seq   int64
	name  string // if the list is ordered by name
}

// parseListQuery reads limit and after.
func (r *manageRequest) parseListQuery() (listQuery, error) {
	p := listQuery{limit: 100}
	if v := r.query.Get("limit"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > 500 {
			return p, badRequest("invalid_value", "limit", "limit must be a whole number from 1 to 500.")
		}
		p.limit = n
	}
	if v := r.query.Get("after"); v != "" {
		var err error
		if p.seq, p.name, err = parseCursor(v); err != nil {
			return p, badRequest("invalid_value", "after", "after must be the value of next in an earlier response.")
		}
	}
	return p, nil
}

// timeRange reads the RFC 3339 times from and to; the arguments are the defaults.
func (r *manageRequest) timeRange(from, to time.Time) (time.Time, time.Time, error) {
	for _, p := range []struct {
		name string
		at   *time.Time
	}{{"from", &from}, {"to", &to}} {
		v := r.query.Get(p.name)
		if v == "" {
			continue
		}
		t, err := time.Parse(time.RFC3339, v)
		if err != nil || t.Year() < 2000 || t.Year() > 2200 {
			return from, to, badRequest("invalid_value", p.name, p.name+" must be a time such as 2026-01-31T00:00:00Z.")
		}
		*p.at = t.UTC()
	}
	if !from.IsZero() && !to.IsZero() && !from.Before(to) {
		return from, to, badRequest("invalid_value", "from", "from must be before to.")
	}
	return from, to, nil
}

// parseAuditFilter reads the filters and the page of a list of audit events.
func (r *manageRequest) parseAuditFilter() (auditFilter, error) {
	page, err := r.parseListQuery()
	if err != nil {
		return auditFilter{}, err
	}
	f := auditFilter{
		actor:     r.query.Get("actor"),
		action:    r.query.Get("action"),
		object:    r.query.Get("object"),
		from:      math.MinInt64,
		to:        math.MaxInt64,
		beforeAt:  math.MaxInt64,
		beforeSeq: math.MaxInt64,
		limit:     page.limit + 1,
	}
	from, to, err := r.timeRange(time.Time{}, time.Time{})
	if err != nil {
		return f, err
	}
	if !from.IsZero() {
		f.from = from.UnixMilli()
	}
	if !to.IsZero() {
		f.to = to.UnixMilli()
	}
	if page.seq > 0 {
		f.beforeSeq = page.seq
		if f.beforeAt, err = strconv.ParseInt(page.name, 10, 64); err != nil {
			return f, badRequest("invalid_value", "after", "after must be the value of next in an earlier response.")
		}
	}
	return f, nil
}

// errRevoked refuses a change of an object that is revoked.
func errRevoked(what string) error {
	return &fieldError{"", "The " + what + " is revoked, which is permanent. Create a new one."}
}

// validateName checks the name of a project, upstream, token or key. A name must not change how the text
// around it is displayed.
func validateName(s string) error {
	if s == "" || len(s) > 100 {
		return &fieldError{"name", "must have 1 to 100 bytes"}
	}
	invisible := func(r rune) bool { // control characters, line separators and changes of text direction
		return r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' ||
			r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069'
	}
	if strings.ContainsFunc(s, invisible) {
		return &fieldError{"name", "must not contain control characters"}
	}
	if strings.TrimSpace(s) != s {
		return &fieldError{"name", "must not begin or end with white space"}
	}
	return nil
}
