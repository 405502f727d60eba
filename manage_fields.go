// This file declares what administrators may send: the inputs of the operations, and a table of the fields
// of each. A field is declared once. Its row in the table has its name in JSON, in forms and in errors, the
// text and kind of its form input, whether null is allowed, its rule, and where its value goes.
//
// The tables drive the decoding of JSON bodies (decodeFields), of forms (fieldTargets: the targets by name),
// the inputs of forms, validation (applyFields), and a test holds openapi.yaml to them. A page shows the
// fields that it names with formFields, and decodes them into the same input as the JSON API.
package main

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// A field is one value of an input I, for an object with the row R.
type field[I, R any] struct {
	name       string
	nullable   bool // null is a value of its own, such as "never"
	resettable bool // null resets it, in a change
	createOnly bool // a change cannot have it

	formText
	target func(*I) any       // the pointer to its optional
	apply  func(*I, *R) error // checks the value and stores it in the row; nil: the input's apply does both
}

// A formText is how forms present a field; see formField.
type formText struct {
	label, kind, placeholder, help string
	required                       bool
	empty                          emptyField
}

// An emptyField tells what an empty form field means.
type emptyField int

const (
	emptyValue   emptyField = iota // the empty text, list or map, or the number 0
	emptyOmitted                   // the operation's default, or no change
	emptyNull
)

// given is an optional with a value.
func given[T any](value T) optional[T] { return optional[T]{set: true, value: value} }

// stored completes a field whose value goes into a column as it is, if it follows the rule.
func stored[I, R, T any](
	f field[I, R], in func(*I) *optional[T], column func(*R) *T, rule func(name string, value T) error,
) field[I, R] {
	f.target = func(input *I) any { return in(input) }
	f.apply = func(input *I, row *R) error {
		o := in(input)
		if !o.hasValue() {
			return nil
		}
		if err := rule(f.name, o.value); err != nil {
			return err
		}
		*column(row) = o.value
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
	fields = slices.DeleteFunc(fields, func(f field[I, R]) bool { return f.createOnly && !isNew })
	var nullable []string
	for _, f := range fields {
		if f.nullable || f.resettable && !isNew {
			nullable = append(nullable, f.name)
		}
	}
	return decodeObject(body, fieldTargets(in, fields), nullable...)
}

// applyFields checks the values that were sent and stores them in the row.
func applyFields[I, R any](in *I, row *R, fields []field[I, R]) error {
	for _, f := range fields {
		if f.apply == nil {
			continue
		}
		if err := f.apply(in, row); err != nil {
			return err
		}
	}
	return nil
}

func anyName(_, value string) error { return validateName(value) }

func anyValue[T any](string, T) error { return nil }

// inRange is the rule for a whole number.
func inRange(from, to int64) func(string, int64) error {
	return func(name string, n int64) error {
		if n < from || n > to {
			return &fieldError{name, fmt.Sprintf("must be from %d to %d", from, to)}
		}
		return nil
	}
}

// zeroOrInRange is the rule for a whole number for which 0 means the default.
func zeroOrInRange(from, to int64) func(string, int64) error {
	return func(name string, n int64) error {
		if n != 0 && (n < from || n > to) {
			return &fieldError{name, fmt.Sprintf("must be 0 or from %d to %d", from, to)}
		}
		return nil
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

func (in *tokenInput) fields() map[string]any { return fieldTargets(in, tokenFields()) }

func tokenFields() []field[tokenInput, tokenRow] {
	type f = field[tokenInput, tokenRow]
	return []f{
		{name: "project_id", createOnly: true, formText: formText{label: "Project", kind: "select", required: true},
			target: func(in *tokenInput) any { return &in.projectID }},
		stored(f{name: "name", formText: formText{label: "Name", required: true, help: "token-name"}},
			func(in *tokenInput) *optional[string] { return &in.name },
			func(t *tokenRow) *string { return &t.name }, anyName),
		{name: "duration_minutes", target: func(in *tokenInput) any { return &in.minutes }},
		{name: "duration_hours", target: func(in *tokenInput) any { return &in.hours }},
		{name: "expires_in_days", target: func(in *tokenInput) any { return &in.days }},
		{name: "expires_at", nullable: true, target: func(in *tokenInput) any { return &in.expiresAt },
			formText: formText{label: "Expires (UTC)", kind: "datetime-local", empty: emptyNull, help: "expiry"}},
		{name: "max_requests", nullable: true, target: func(in *tokenInput) any { return &in.maxRequests },
			formText: formText{label: "Maximum calls", kind: "number", empty: emptyNull, help: "max-requests"},
			apply:    (*tokenInput).applyMaxRequests},
		{name: "idle_expiry_minutes", nullable: true, target: func(in *tokenInput) any { return &in.idleMinutes },
			formText: formText{
				label: "Expires when idle (minutes)", kind: "number", empty: emptyNull, help: "idle-expiry"},
			apply: (*tokenInput).applyIdleExpiry},
		{name: "policy", nullable: true, target: func(in *tokenInput) any { return &in.policy },
			apply: func(in *tokenInput, t *tokenRow) error { return applyPolicy(in.policy, false, &t.policy) }},
	}
}

// apply checks the input and stores it in the row.
func (in *tokenInput) apply(t *tokenRow, now time.Time) error {
	if err := applyFields(in, t, tokenFields()); err != nil {
		return err
	}
	return in.applyExpiry(t, now)
}

// applyExpiry sets when the token expires, if the input tells.
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

func (in *tokenInput) applyMaxRequests(t *tokenRow) error {
	if !in.maxRequests.set {
		return nil
	}
	t.maxRequests = nil
	if in.maxRequests.null {
		return nil
	}
	if in.maxRequests.value < 0 || in.maxRequests.value > math.MaxInt64/2 {
		return &fieldError{"max_requests", "must be 0 (none) or more, or null (unlimited)"}
	}
	t.maxRequests = new(in.maxRequests.value)
	return nil
}

func (in *tokenInput) applyIdleExpiry(t *tokenRow) error {
	if !in.idleMinutes.set {
		return nil
	}
	t.idleExpiry = nil
	if in.idleMinutes.null {
		return nil
	}
	if in.idleMinutes.value < 1 || in.idleMinutes.value > int64(maxLifetime/time.Minute) {
		return &fieldError{"idle_expiry_minutes", "must be at least 1 and at most 100 years, or null"}
	}
	t.idleExpiry = new(in.idleMinutes.value * time.Minute.Milliseconds())
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

func (in *rotateInput) fields() map[string]any { return fieldTargets(in, rotateFields()) }

const (
	defaultOverlapMinutes = 60
	maxOverlapMinutes     = 30 * 24 * 60
)

func rotateFields() []field[rotateInput, int64] {
	return []field[rotateInput, int64]{stored(field[rotateInput, int64]{name: "overlap_minutes",
		formText: formText{label: "Keep the old value valid for", kind: "select", required: true}},
		func(in *rotateInput) *optional[int64] { return &in.overlapMinutes },
		func(minutes *int64) *int64 { return minutes }, inRange(0, maxOverlapMinutes))}
}

// A keyInput is what can be sent about a management key.
type keyInput struct{ name, role, expiresAt optional[string] }

func (in *keyInput) fields() map[string]any { return fieldTargets(in, keyFields()) }

func keyFields() []field[keyInput, managementKeyRow] {
	type f = field[keyInput, managementKeyRow]
	return []f{
		stored(f{name: "name", formText: formText{label: "Name", required: true, help: "key-name"}},
			func(in *keyInput) *optional[string] { return &in.name },
			func(k *managementKeyRow) *string { return &k.name }, anyName),
		stored(f{name: "role", formText: formText{label: "Role", kind: "select", required: true}},
			func(in *keyInput) *optional[string] { return &in.role },
			func(k *managementKeyRow) *string { return &k.role }, validateRole),
		{name: "expires_at", nullable: true, target: func(in *keyInput) any { return &in.expiresAt },
			formText: formText{label: "Expires (UTC)", kind: "datetime-local", empty: emptyNull, help: "expiry"}},
	}
}

func validateRole(name, value string) error {
	if role(value).rank() == 0 {
		return &fieldError{name, "must be viewer, operator or admin"}
	}
	return nil
}

// apply checks the input and stores it in the row.
func (in *keyInput) apply(k *managementKeyRow, now time.Time) (err error) {
	if err = applyFields(in, k, keyFields()); err == nil && in.expiresAt.set {
		k.expiresAt, err = parseFutureTime("expires_at", in.expiresAt, now)
	}
	return err
}

// A projectInput is what can be sent about a project. The provider, base URL and keys are those of the first
// upstream of a new project.
type projectInput struct {
	name, provider, baseURL optional[string]
	key, openaiKey          optional[secret]
	active                  optional[bool]
	policy, routing         optional[json.RawMessage]
}

func (in *projectInput) fields() map[string]any { return fieldTargets(in, projectFields()) }

func projectFields() []field[projectInput, projectRow] {
	type f = field[projectInput, projectRow]
	return []f{
		stored(f{name: "name", formText: formText{label: "Name", required: true, help: "project-name"}},
			func(in *projectInput) *optional[string] { return &in.name },
			func(p *projectRow) *string { return &p.name }, anyName),
		{name: "provider", createOnly: true, target: func(in *projectInput) any { return &in.provider },
			formText: formText{label: "Provider", kind: "select", required: true}},
		{name: "api_key", createOnly: true, target: func(in *projectInput) any { return &in.key },
			formText: formText{label: "API key", kind: "password", empty: emptyOmitted, help: "first-api-key"}},
		{name: "openai_api_key", createOnly: true, target: func(in *projectInput) any { return &in.openaiKey }},
		{name: "base_url", createOnly: true, target: func(in *projectInput) any { return &in.baseURL },
			formText: formText{label: "Base URL", placeholder: "https://", empty: emptyOmitted, help: "base-url"}},
		stored(f{name: "is_active"}, func(in *projectInput) *optional[bool] { return &in.active },
			func(p *projectRow) *bool { return &p.active }, anyValue),
		{name: "policy", resettable: true, target: func(in *projectInput) any { return &in.policy },
			apply: func(in *projectInput, p *projectRow) error { return applyPolicy(in.policy, true, &p.policy) }},
		{name: "routing", resettable: true, target: func(in *projectInput) any { return &in.routing },
			apply: (*projectInput).applyRouting},
	}
}

// apply checks the input and stores it in the row.
func (in *projectInput) apply(p *projectRow) error { return applyFields(in, p, projectFields()) }

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
	rewrite                                                    optional[json.RawMessage]
	active                                                     optional[bool]
}

func (in *upstreamInput) fields() map[string]any { return fieldTargets(in, upstreamFields()) }

// An upstreamEdit is an upstream while it is changed: its row, with the settings decoded.
type upstreamEdit struct {
	*upstreamRow
	settings upstreamSettings
}

func upstreamFields() []field[upstreamInput, upstreamEdit] {
	type f = field[upstreamInput, upstreamEdit]
	return slices.Concat([]f{
		stored(f{name: "name", formText: formText{label: "Name", required: true, help: "upstream-name"}},
			func(in *upstreamInput) *optional[string] { return &in.name },
			func(u *upstreamEdit) *string { return &u.name }, anyName),
		{name: "provider", target: func(in *upstreamInput) any { return &in.provider },
			formText: formText{label: "Provider", kind: "select", required: true}},
		{name: "api_key", target: func(in *upstreamInput) any { return &in.key },
			formText: formText{label: "API key", kind: "password", empty: emptyOmitted, help: "api-key"}},
		{name: "base_url", target: func(in *upstreamInput) any { return &in.baseURL },
			formText: formText{label: "Base URL", placeholder: "https://", empty: emptyOmitted, help: "base-url"}},
		stored(f{name: "is_active", formText: formText{label: "Active", kind: "checkbox", help: "is-active"}},
			func(in *upstreamInput) *optional[bool] { return &in.active },
			func(u *upstreamEdit) *bool { return &u.active }, anyValue),
		{name: "models", target: func(in *upstreamInput) any { return &in.models },
			formText: formText{label: "Models", kind: "lines", placeholder: "gpt-4o*", help: "upstream-models"},
			apply:    (*upstreamInput).applyModels},
		stored(f{name: "priority",
			formText: formText{
				label: "Priority", kind: "number", required: true, empty: emptyOmitted, help: "priority"}},
			func(in *upstreamInput) *optional[int64] { return &in.priority },
			func(u *upstreamEdit) *int64 { return &u.priority }, inRange(0, 1000)),
		stored(f{name: "weight",
			formText: formText{
				label: "Weight", kind: "number", required: true, empty: emptyOmitted, help: "weight"}},
			func(in *upstreamInput) *optional[int64] { return &in.weight },
			func(u *upstreamEdit) *int64 { return &u.weight }, inRange(0, 1000)),
		{name: "rewrite", target: func(in *upstreamInput) any { return &in.rewrite },
			formText: formText{
				label: "Model name mapping", kind: "pairs", placeholder: "gpt-4o = my-deployment", help: "rewrite"},
			apply: (*upstreamInput).applyRewrite},
	}, upstreamSettingFields(), []f{
		{name: "shared_with", target: func(in *upstreamInput) any { return &in.sharedWith },
			formText: formText{
				label: "Shared with projects", kind: "lines", placeholder: "proj_…", help: "shared-with"},
			apply: (*upstreamInput).applySharing},
		stored(f{name: "note", formText: formText{label: "Note", help: "note"}},
			func(in *upstreamInput) *optional[string] { return &in.note },
			func(u *upstreamEdit) *string { return &u.settings.Note }, validateShortText),
		stored(f{name: "organization",
			formText: formText{label: "OpenAI organization", placeholder: "org-…", help: "organization"}},
			func(in *upstreamInput) *optional[string] { return &in.organization },
			func(u *upstreamEdit) *string { return &u.organization }, validateProviderID),
		stored(f{name: "openai_project",
			formText: formText{label: "OpenAI project", placeholder: "proj_…", help: "openai-project"}},
			func(in *upstreamInput) *optional[string] { return &in.openaiProject },
			func(u *upstreamEdit) *string { return &u.openaiProject }, validateProviderID),
	})
}

// upstreamSettingFields declares the limits and timeouts of an upstream; 0 is the default.
func upstreamSettingFields() []field[upstreamInput, upstreamEdit] {
	longest, connect := (2 * time.Hour).Milliseconds(), connectTimeout.Milliseconds()
	type f = field[upstreamInput, upstreamEdit]
	return []f{
		stored(f{name: "requests_per_minute",
			formText: formText{label: "Requests per minute", kind: "number", help: "requests-per-minute"}},
			func(in *upstreamInput) *optional[int64] { return &in.requestsPerMinute },
			func(u *upstreamEdit) *int64 { return &u.settings.RequestsPerMinute }, zeroOrInRange(1, 1_000_000_000)),
		stored(f{name: "tokens_per_minute",
			formText: formText{label: "Tokens per minute", kind: "number", help: "tokens-per-minute"}},
			func(in *upstreamInput) *optional[int64] { return &in.tokensPerMinute },
			func(u *upstreamEdit) *int64 { return &u.settings.TokensPerMinute }, zeroOrInRange(1, 1_000_000_000_000)),
		stored(f{name: "connect_ms",
			formText: formText{label: "Connect timeout (ms)", kind: "number", help: "connect-timeout"}},
			func(in *upstreamInput) *optional[int64] { return &in.connectMS },
			func(u *upstreamEdit) *int64 { return &u.settings.ConnectMS }, zeroOrInRange(100, connect)),
		stored(f{name: "answer_ms",
			formText: formText{label: "Response timeout (ms)", kind: "number", help: "response-timeout"}},
			func(in *upstreamInput) *optional[int64] { return &in.answerMS },
			func(u *upstreamEdit) *int64 { return &u.settings.AnswerMS }, zeroOrInRange(100, longest)),
		stored(f{name: "first_event_ms",
			formText: formText{label: "First event timeout (ms)", kind: "number", help: "first-event-timeout"}},
			func(in *upstreamInput) *optional[int64] { return &in.firstEventMS },
			func(u *upstreamEdit) *int64 { return &u.settings.FirstEventMS }, zeroOrInRange(100, longest)),
		stored(f{name: "idle_ms",
			formText: formText{label: "Longest pause between events (ms)", kind: "number", help: "idle-timeout"}},
			func(in *upstreamInput) *optional[int64] { return &in.idleMS },
			func(u *upstreamEdit) *int64 { return &u.settings.IdleMS }, zeroOrInRange(100, longest)),
	}
}

// apply checks the input and stores it in the row, whose id and projectID are set.
func (in *upstreamInput) apply(ops *operations, row *upstreamRow, isNew bool) error {
	in.name.set = in.name.set || isNew // it is required
	if err := in.applyProvider(row, isNew); err != nil {
		return err
	}
	if err := in.applyDestination(ops, row, isNew); err != nil {
		return err
	}
	edit := upstreamEdit{upstreamRow: row}
	if err := json.Unmarshal([]byte(row.settings), &edit.settings); err != nil {
		return fmt.Errorf("settings of upstream %s: %w", row.id, err)
	}
	if err := applyFields(in, &edit, upstreamFields()); err != nil {
		return err
	}
	row.settings = edit.settings.String()
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
	if !slices.Contains([]string{providerOpenAI, providerAnthropic, providerAzure, providerCompatible}, row.provider) {
		return &fieldError{"provider", "must be openai, anthropic, azure or compatible"}
	}
	return nil
}

func (in *upstreamInput) applyModels(u *upstreamEdit) error {
	if !in.models.set {
		return nil
	}
	if err := checkPatterns("models", in.models.value); err != nil {
		return err
	}
	return storeJSON(&u.models, append([]string{}, in.models.value...))
}

func (in *upstreamInput) applyRewrite(u *upstreamEdit) error {
	if !in.rewrite.hasValue() {
		return nil
	}
	names, err := parseRewrite(in.rewrite.value)
	if err != nil {
		return err
	}
	return storeJSON(&u.rewrite, names)
}

func (in *upstreamInput) applySharing(u *upstreamEdit) error {
	if !in.sharedWith.set {
		return nil
	}
	ids := slices.Compact(slices.Sorted(slices.Values(in.sharedWith.value)))
	if len(ids) > 500 {
		return &fieldError{"shared_with", "must have 500 entries or fewer"}
	}
	return storeJSON(&u.sharedWith, append([]string{}, ids...))
}

// storeJSON stores a value in a column of JSON text.
func storeJSON(column *string, value any) error {
	b, err := json.Marshal(value)
	if err == nil {
		*column = string(b)
	}
	return err
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

// A priceInput is what can be sent about a price, in dollars per million tokens.
type priceInput struct {
	match   optional[string]
	amounts [6]optional[json.RawMessage] // in the order of priceRow.priceFields
}

func (in *priceInput) fields() map[string]any { return fieldTargets(in, priceFields()) }

func priceFields() []field[priceInput, priceRow] {
	fields := []field[priceInput, priceRow]{{name: "match", target: func(in *priceInput) any { return &in.match },
		formText: formText{label: "Model", required: true, placeholder: "gpt-4o-mini or my-model-*", help: "match"},
		apply:    (*priceInput).applyMatch}}
	for i, amount := range [...]struct{ name, label, help string }{
		{"input", "Input", ""},
		{"cached_input", "Cached input", "as-input"},
		{"cache_write", "Cache write", "as-input"},
		{"output", "Output", ""},
		{"audio_input", "Audio input", "as-input"},
		{"audio_output", "Audio output", "as-output"},
	} {
		fields = append(fields, field[priceInput, priceRow]{
			name: amount.name, nullable: true, target: func(in *priceInput) any { return &in.amounts[i] },
			formText: formText{label: amount.label, kind: "number", empty: emptyOmitted, help: amount.help},
			apply: func(in *priceInput, p *priceRow) (err error) {
				*p.priceFields()[i], err = parseAmount(amount.name, in.amounts[i])
				return err
			},
		})
	}
	return fields
}

// parseAmount parses dollars per million tokens, a JSON number or a string. It returns nil for none.
func parseAmount(name string, in optional[json.RawMessage]) (*int64, error) {
	if !in.hasValue() {
		return nil, nil
	}
	pico, err := parseDollars(strings.Trim(string(in.value), `"`))
	if err != nil {
		return nil, &fieldError{name, "must be dollars per million tokens: 0 to 1000000, with at most 6 decimals"}
	}
	return &pico, nil
}

func (in *priceInput) applyMatch(p *priceRow) error {
	p.match = in.match.value
	isControl := func(c rune) bool { return c <= ' ' || c == 0x7f }
	if p.match == "" || len(p.match) > 256 || strings.ContainsFunc(p.match, isControl) {
		return &fieldError{"match", "must be a model's name, or a pattern with *, of 1 to 256 bytes"}
	}
	return nil
}

// apply checks the input and stores it in the row.
func (in *priceInput) apply(p *priceRow) error {
	if err := applyFields(in, p, priceFields()); err != nil {
		return err
	}
	if p.input == nil && p.output == nil {
		return &fieldError{"input", "or output is required"}
	}
	return nil
}
