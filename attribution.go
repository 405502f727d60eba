// This file says for whom and for what a call is made: its session, its end user and its tags, and what a policy asks
// of them. All of it is what clients say about themselves. It is recorded, grouped and limited by, and grants nothing.
// Plain code: it gets headers and fields that were read, and returns values; it hashes, stores and sends nothing.
// It also says what the patterns of policies and limits match.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// An attribution says for whom and for what a call is made. It never changes. nil: the client has said nothing.
type attribution struct {
	session string
	endUser string  // as it is recorded: its hash, if the project's policy asks for that
	tags    tagList // by key
}

// A tag is one key=value of the header X-LLM-Proxy-Tags, or of a token's own tags.
type tag struct{ key, value string }

// A tagList is a list of tags with different keys, sorted by key. In JSON it is an object.
type tagList []tag

const (
	maxTags           = 8
	maxTagKeyLen      = 32
	maxTagValueLen    = 64
	maxAttributionLen = 256  // bytes of a session or an end user
	maxIdentityLen    = 1024 // bytes of a field that may have both, as Claude Code's has
)

// The names of what a policy may require, and of what usage may be grouped by. A tag's is tagAttribute and its key.
const (
	sessionAttribute = "session"
	endUserAttribute = "end_user"
	tagAttribute     = "tag:"
)

// The headers by which any client can say what its API has no field for. They are not forwarded.
const (
	sessionHeader = "X-Llm-Proxy-Session"
	endUserHeader = "X-Llm-Proxy-End-User"
	tagsHeader    = "X-Llm-Proxy-Tags"
)

// value returns what the call says of an attribute, "" if nothing.
func (a *attribution) value(attribute string) string {
	if a == nil {
		return ""
	}
	switch attribute {
	case sessionAttribute:
		return a.session
	case endUserAttribute:
		return a.endUser
	}
	if key, ok := strings.CutPrefix(attribute, tagAttribute); ok {
		return a.tags.value(key)
	}
	return ""
}

// each calls do with the name and the value of each attribute that the call has.
func (a *attribution) each(do func(attribute, value string)) {
	if a == nil {
		return
	}
	if a.session != "" {
		do(sessionAttribute, a.session)
	}
	if a.endUser != "" {
		do(endUserAttribute, a.endUser)
	}
	for _, t := range a.tags {
		do(tagAttribute+t.key, t.value)
	}
}

// withEndUser returns a copy in which name is the end user: the keyed hash of it, or "" for nobody. A client may send
// the end user as its session or in a tag, too; it has the same name there. The tags in fixed stay: they are the
// token's own, and a client that names an end user after one must not leave its budget.
func (a *attribution) withEndUser(name string, fixed tagList) *attribution {
	if a == nil || a.endUser == "" {
		return a
	}
	named := *a
	named.endUser = name
	if a.session == a.endUser {
		named.session = name
	}
	named.tags = nil
	for _, t := range a.tags {
		if t.value == a.endUser && fixed.value(t.key) == "" {
			t.value = name
		}
		if t.value != "" {
			named.tags = append(named.tags, t)
		}
	}
	if named.session == "" && named.endUser == "" && len(named.tags) == 0 {
		return nil
	}
	return &named
}

// without returns a copy in which name is neither the end user nor the session, nor the value of a tag.
func (a *attribution) without(name string) *attribution {
	kept := attribution{tags: slices.DeleteFunc(slices.Clone(a.tags), func(t tag) bool { return t.value == name })}
	if a.session != name {
		kept.session = a.session
	}
	if a.endUser != name {
		kept.endUser = a.endUser
	}
	return &kept
}

// columns returns the values of the ledger's columns.
func (a *attribution) columns() (session, endUser, tags string) {
	if a == nil {
		return "", "", ""
	}
	return a.session, a.endUser, a.tags.text()
}

// attributionColumns returns where a query puts the ledger's columns.
func (r *requestRow) attributionColumns() []any {
	a := &attribution{}
	r.attribution = a
	return []any{&a.session, &a.endUser, &a.tags}
}

// attributionJSON is the form of an attribution in unwritten rows and in answers of /manage.
type attributionJSON struct {
	Session string  `json:"session"`
	EndUser string  `json:"end_user"`
	Tags    tagList `json:"tags"`
}

func newAttributionJSON(a *attribution) (v attributionJSON) {
	if a != nil {
		v = attributionJSON{a.session, a.endUser, a.tags}
	}
	return v
}

func (a *attribution) MarshalJSON() ([]byte, error) {
	return json.Marshal(newAttributionJSON(a))
}

func (a *attribution) UnmarshalJSON(text []byte) error {
	var v attributionJSON
	err := json.Unmarshal(text, &v)
	*a = attribution{v.Session, v.EndUser, v.Tags}
	return err
}

func (l tagList) value(key string) string {
	for _, t := range l {
		if t.key == key {
			return t.value
		}
	}
	return ""
}

// text returns the list as the ledger stores it: a JSON object, or "" if it is empty.
func (l tagList) text() string {
	if len(l) == 0 {
		return ""
	}
	b := make([]byte, 0, 128)
	for i, t := range l {
		b = appendJSONString(append(b, "{,"[min(i, 1)]), t.key)
		b = appendJSONString(append(b, ':'), t.value)
	}
	return string(append(b, '}'))
}

func (l tagList) MarshalJSON() ([]byte, error) { return []byte(cmp.Or(l.text(), "{}")), nil }

func (l *tagList) UnmarshalJSON(text []byte) error {
	var object map[string]string
	if err := json.Unmarshal(text, &object); err != nil {
		return err
	}
	*l = nil
	for _, key := range slices.Sorted(maps.Keys(object)) {
		*l = append(*l, tag{key, object[key]})
	}
	return nil
}

// Scan reads what text returned from a column of the database.
func (l *tagList) Scan(column any) error {
	text, ok := column.(string)
	if !ok {
		return fmt.Errorf("the column of tags is a %T", column)
	}
	if *l = nil; text == "" {
		return nil
	}
	return l.UnmarshalJSON([]byte(text))
}

// isTagKey reports whether s may be the key of a tag.
func isTagKey(s string) bool {
	for i, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || i > 0 && (c >= '0' && c <= '9' || c == '_' || c == '-')) {
			return false
		}
	}
	return s != "" && len(s) <= maxTagKeyLen
}

// isTagValue reports whether s may be the value of a tag.
func isTagValue(s string) bool {
	for _, c := range []byte(s) {
		if !(c|0x20 >= 'a' && c|0x20 <= 'z' || c >= '0' && c <= '9' || strings.IndexByte("._:/@+-", c) >= 0) {
			return false
		}
	}
	return s != "" && len(s) <= maxTagValueLen
}

// isEndUserHash reports whether s has the form of a hash of an end user.
func isEndUserHash(s string) bool {
	digits, ok := strings.CutPrefix(s, endUserHashPrefix)
	return ok && len(digits) == 32 && strings.Trim(digits, "0123456789abcdef") == ""
}

const endUserHashPrefix = "h-"

const tagValueRule = "1 to 64 letters, digits or ._:/@+-"

// isAttribute reports whether s is the name of an attribute: session, end_user or tag:KEY.
func isAttribute(s string) bool {
	key, isTag := strings.CutPrefix(s, tagAttribute)
	return s == sessionAttribute || s == endUserAttribute || isTag && isTagKey(key)
}

// isAttributionValue reports whether s may be recorded as a session or an end user: it has 1 to 256 bytes of printable
// text. Characters that are not seen, or that change the direction of text, could make one name look like another.
func isAttributionValue(s string) bool {
	hidden := func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }
	return s != "" && len(s) <= maxAttributionLen && !strings.ContainsFunc(s, hidden)
}

// A bodyIdentity has the fields of a request body that name a session or an end user, "" where the body has none. None
// of them is a protected name: each may occur in any number, and of several the last counts.
type bodyIdentity struct{ user, safetyIdentifier, metadataUserID, promptCacheKey string }

// field returns where the value of a top-level field belongs, nil for other fields.
func (b *bodyIdentity) field(name []byte) *string {
	switch string(name) {
	case "user":
		return &b.user
	case "safety_identifier":
		return &b.safetyIdentifier
	case "prompt_cache_key":
		return &b.promptCacheKey
	}
	return nil
}

// identityText returns the text of a JSON string, or "" for any other value, and for one that is too long for a name.
func identityText(raw []byte) (text string) {
	if len(raw) < 2 || raw[0] != '"' || len(raw) > maxIdentityLen {
		return ""
	}
	if bytes.IndexByte(raw, '\\') < 0 {
		return string(raw[1 : len(raw)-1])
	}
	if json.Unmarshal(raw, &text) != nil {
		return ""
	}
	return text
}

// sessionHeaders are the headers that name a session, in the order in which they are read.
var sessionHeaders = [...]string{sessionHeader, "X-Claude-Code-Session-Id", "Session-Id", "Session_id",
	"Conversation-Id", "Conversation_id", "X-Opencode-Session", "X-Session-Id", "X-Session-Affinity"}

// readAttribution returns what a request says of itself, with the tags of the token, as far as the policies of its
// project and its token allow; nil is a policy that says nothing. If it returns an error, what it could read is valid.
// Names that the program does not define are for the provider, which checks them: values that cannot be recorded are
// passed over. Its own headers must be right.
func readAttribution(header map[string][]string, body *bodyIdentity, project, token *attributionPolicy,
) (a *attribution, err error) {
	var found attribution
	for _, own := range [...]string{sessionHeader, endUserHeader} {
		if values := header[own]; len(values) > 1 || len(values) == 1 && !isAttributionValue(values[0]) {
			err = badRequest("invalid_attribution", own,
				own+" must occur once, and have 1 to 256 bytes of printable text in UTF-8.")
		}
	}
	for i := 0; i < len(sessionHeaders) && found.session == ""; i++ {
		if values := header[sessionHeaders[i]]; len(values) > 0 && isAttributionValue(values[0]) {
			found.session = values[0]
		}
	}
	if found.session == "" && isAttributionValue(body.promptCacheKey) {
		found.session = body.promptCacheKey
	}
	if values := header[endUserHeader]; len(values) > 0 && isAttributionValue(values[0]) {
		found.endUser = values[0]
	}
	for _, name := range [...]string{body.user, body.safetyIdentifier, body.metadataUserID} {
		user, session := splitUserID(name)
		if found.endUser == "" {
			found.endUser = user
		}
		if found.session == "" {
			found.session = session
		}
	}
	tags, tagErr := readTags(header[tagsHeader], project, token)
	if found.tags = tags; found.session != "" || found.endUser != "" || len(tags) > 0 {
		a = new(found) // nothing is allocated for a client that says nothing
	}
	return a, cmp.Or(err, tagErr)
}

// splitUserID returns the end user of a field, and the session that Claude Code puts there: as JSON, or in earlier
// versions as user_DEVICE_account_ACCOUNT_session_SESSION. Its end user is the account, or the device if there is none.
func splitUserID(field string) (user, session string) {
	rest, isClaude := strings.CutPrefix(field, "user_")
	device, rest, hasAccount := strings.Cut(rest, "_account_")
	account, id, hasSession := strings.Cut(rest, "_session_")
	switch {
	case isClaude && hasAccount && hasSession:
		user, session = cmp.Or(account, device), id
	case strings.HasPrefix(field, "{"):
		user, session = splitUserJSON(field)
	}
	if user == "" {
		user, session = field, ""
	}
	if !isAttributionValue(user) {
		user = ""
	}
	if !isAttributionValue(session) {
		session = ""
	}
	return user, session
}

// splitUserJSON is splitUserID for JSON. It returns nothing for other text, and for JSON that names nobody.
func splitUserJSON(field string) (user, session string) {
	var parts struct {
		Device  string `json:"device_id"`
		Account string `json:"account_uuid"`
		Session string `json:"session_id"`
	}
	if json.Unmarshal([]byte(field), &parts) != nil {
		return "", ""
	}
	return cmp.Or(parts.Account, parts.Device), parts.Session
}

// readTags returns the token's own tags and those of the header lines, sorted by key. If it returns an error, the list
// has the token's own.
func readTags(lines []string, project, token *attributionPolicy) (tagList, error) {
	own := token.fixedTags()
	if len(lines) == 0 {
		return own, nil
	}
	refuse := func(format string, args ...any) (tagList, error) {
		return own, badRequest("invalid_tags", "X-LLM-Proxy-Tags", "X-LLM-Proxy-Tags "+fmt.Sprintf(format, args...))
	}
	all := slices.Clone(own)
	for pair := range strings.SplitSeq(strings.Join(lines, ","), ",") {
		key, value, ok := strings.Cut(strings.Trim(pair, " \t"), "=")
		shown := clip(fmt.Sprintf("%+q", clip(key, maxTagKeyLen)), 80)
		switch {
		case !ok:
			return refuse("must be a list such as team=search,task=4711. It has %s without '='.", shown)
		case !project.allowsTag(key) && own.value(key) == "":
			return refuse("has the key %s, which the project's policy does not allow. %s", shown,
				project.allowedTags())
		case !isTagValue(value):
			return refuse("must have %s as the value of %s.", tagValueRule, shown)
		case own.value(key) != "" && own.value(key) != value:
			return refuse("must not change %s: this token's own tag is %s=%s.", shown, key, own.value(key))
		case own.value(key) != "":
			continue
		case all.value(key) != "":
			return refuse("has the key %s twice.", shown)
		case len(all) == maxTags:
			return refuse("has too many keys: a call has %d tags at most, with its token's own.", maxTags)
		}
		all = append(all, tag{key, value})
	}
	slices.SortFunc(all, func(x, y tag) int { return cmp.Compare(x.key, y.key) })
	return all, nil
}

// An attributionFilter lets the calls through that have these values. Empty strings let all calls through.
type attributionFilter struct{ session, endUser, tagKey, tagValue string }

// newAttributionFilter makes a filter of three texts; that of a tag is KEY=VALUE.
func newAttributionFilter(session, endUser, tagText string) (attributionFilter, error) {
	key, value, ok := strings.Cut(tagText, "=")
	if tagText != "" && (!ok || !isTagKey(key) || !isTagValue(value)) {
		return attributionFilter{}, badRequest("invalid_value", "tag",
			"tag must be a key and a value such as team=search.")
	}
	return attributionFilter{session, endUser, key, value}, nil
}

// matches reports whether the filter lets a call through.
func (f *attributionFilter) matches(a *attribution) bool {
	return (f.session == "" || f.session == a.value(sessionAttribute)) &&
		(f.endUser == "" || f.endUser == a.value(endUserAttribute)) &&
		(f.tagKey == "" || f.tagValue == a.value(tagAttribute+f.tagKey))
}

// An attributionPolicy is what a policy says about attribution. It is immutable. Tags and EndUsers are the project's;
// FixedTags are a token's.
type attributionPolicy struct {
	Tags      []string `json:"tags,omitzero"`     // keys that clients may send
	Required  []string `json:"required,omitzero"` // attributes without which calls that use tokens are refused
	EndUsers  string   `json:"end_users,omitzero"`
	FixedTags tagList  `json:"fixed_tags,omitzero"` // of every call, whatever the client sends
}

// How end users are recorded.
const (
	endUsersPlain  = "plain"  // as sent; "" means the same
	endUsersHashed = "hashed" // by a keyed hash
	endUsersOff    = "off"    // not at all
)

const maxTagKeys = 50 // that a project allows

// parseAttributionPolicy reads an attribution policy from JSON, strictly.
func parseAttributionPolicy(raw []byte, ofProject bool) (*attributionPolicy, error) {
	var tags, required optional[[]string]
	var endUsers optional[string]
	var fixed optional[map[string]string]
	fields := map[string]any{"required": &required, "tags": &tags, "end_users": &endUsers}
	if !ofProject {
		fields = map[string]any{"required": &required, "fixed_tags": &fixed}
	}
	refuse := func(field, msg string) (*attributionPolicy, error) {
		return nil, &fieldError{"policy.attribution." + field, msg}
	}
	if err := decodeObject(raw, fields); err != nil {
		if fe, ok := err.(*fieldError); ok && fe.param != "" {
			return refuse(fe.param, fe.msg)
		}
		return nil, &fieldError{"policy.attribution", "must be an object"}
	}
	p := &attributionPolicy{Tags: tags.value, Required: required.value, EndUsers: endUsers.value}
	if repeats(p.Tags) || len(p.Tags) > maxTagKeys || !allOf(p.Tags, isTagKey) {
		return refuse("tags", fmt.Sprintf("must have %d keys or fewer, each once, of 1 to %d characters: small "+
			"letters, digits, _ and -, a letter first", maxTagKeys, maxTagKeyLen))
	}
	if repeats(p.Required) || len(p.Required) > maxTags+2 || !allOf(p.Required, isAttribute) {
		return refuse("required", "must list some of end_user, session and tag:KEY, each once")
	}
	switch p.EndUsers {
	case "", endUsersPlain, endUsersHashed, endUsersOff:
	default:
		return refuse("end_users", "must be plain, hashed or off")
	}
	for _, attribute := range p.Required {
		key, isTag := strings.CutPrefix(attribute, tagAttribute)
		if ofProject && isTag && !slices.Contains(p.Tags, key) {
			return refuse("required", "has "+attribute+", but tags does not allow this key")
		}
		if attribute == endUserAttribute && p.EndUsers == endUsersOff {
			return refuse("required", "has end_user, but end_users is off")
		}
	}
	for _, key := range slices.Sorted(maps.Keys(fixed.value)) {
		if !isTagKey(key) || !isTagValue(fixed.value[key]) || len(fixed.value) > maxTags {
			return refuse("fixed_tags", fmt.Sprintf(`must be an object such as {"team":"search"} with %d keys or `+
				"fewer; a key has 1 to %d small letters, digits, _ and -, a letter first, a value %s",
				maxTags, maxTagKeyLen, tagValueRule))
		}
		p.FixedTags = append(p.FixedTags, tag{key, fixed.value[key]})
	}
	return p, nil
}

func repeats(list []string) bool {
	return len(slices.Compact(slices.Sorted(slices.Values(list)))) < len(list)
}

func allOf(list []string, ok func(string) bool) bool {
	return !slices.ContainsFunc(list, func(s string) bool { return !ok(s) })
}

func (p *attributionPolicy) allowsTag(key string) bool {
	return p != nil && slices.Contains(p.Tags, key)
}

// fixedTags returns the tags that every call of a token has.
func (p *attributionPolicy) fixedTags() tagList {
	if p == nil {
		return nil
	}
	return p.FixedTags
}

// allowedTags says which keys a client may send.
func (p *attributionPolicy) allowedTags() string {
	if p == nil || len(p.Tags) == 0 {
		return "It allows none."
	}
	return "It allows: " + clip(strings.Join(p.Tags, ", "), 500) + "."
}

// recordsEndUsers returns how end users are recorded.
func (p *attributionPolicy) recordsEndUsers() string {
	if p == nil {
		return endUsersPlain
	}
	return cmp.Or(p.EndUsers, endUsersPlain)
}

// checkRequired returns an error that names each attribute that the policies of the project and the token require and
// the call lacks, and how to send it.
func checkRequired(a *attribution, policies ...*attributionPolicy) error {
	var missing, how []string
	for _, p := range policies {
		if p == nil {
			continue
		}
		for _, attribute := range p.Required {
			if a.value(attribute) != "" || slices.Contains(missing, attribute) {
				continue
			}
			missing = append(missing, attribute)
			switch key, _ := strings.CutPrefix(attribute, tagAttribute); attribute {
			case sessionAttribute:
				how = append(how, "the session in the header X-LLM-Proxy-Session, or in prompt_cache_key")
			case endUserAttribute:
				how = append(how, "the end user in the header X-LLM-Proxy-End-User, or in user, safety_identifier "+
					"or metadata.user_id")
			default:
				how = append(how, "the tag "+key+" in the header X-LLM-Proxy-Tags: "+key+"=VALUE")
			}
		}
	}
	if missing == nil {
		return nil
	}
	return badRequest("attribution_required", missing[0], "The policy requires "+strings.Join(missing, ", ")+
		" of each call. Send "+strings.Join(how, "; ")+".")
}

// narrowed returns what asks for all that both policies ask for, and allows what both allow. Where only one of them is
// set, it has that one.
func (p *attributionPolicy) narrowed(o *attributionPolicy) *attributionPolicy {
	if p == nil || o == nil {
		return cmp.Or(p, o)
	}
	ofProject := p.Tags != nil || o.Tags != nil
	n := &attributionPolicy{FixedTags: o.FixedTags, EndUsers: o.EndUsers}
	for _, strict := range [...]string{endUsersHashed, endUsersOff} {
		if p.EndUsers == strict {
			n.EndUsers = strict
		}
		if o.EndUsers == endUsersOff {
			n.EndUsers = endUsersOff
		}
	}
	for _, key := range p.Tags {
		if o.allowsTag(key) {
			n.Tags = append(n.Tags, key)
		}
	}
	for _, attribute := range slices.Concat(o.Required, p.Required) {
		key, isTag := strings.CutPrefix(attribute, tagAttribute)
		impossible := isTag && ofProject && !n.allowsTag(key) ||
			attribute == endUserAttribute && n.EndUsers == endUsersOff
		if !impossible && !slices.Contains(n.Required, attribute) {
			n.Required = append(n.Required, attribute)
		}
	}
	return n
}

// A limitRule is what a limit with for_each counts, as the limit's rule has it in JSON.
type limitRule struct {
	ForEach  string `json:"for_each"`
	Count    string `json:"count"`
	Per      string `json:"per,omitzero"`
	Endpoint string `json:"endpoint,omitzero"`
	Model    string `json:"model,omitzero"`
}

func matchesAnyPattern(patterns []string, s string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matchesPattern(p, s) })
}

// matchesPattern reports whether s equals the pattern, or starts with it if the pattern ends in *.
func matchesPattern(pattern, s string) bool {
	prefix, ok := strings.CutSuffix(pattern, "*")
	return pattern == s || ok && strings.HasPrefix(s, prefix)
}

// matchesEndpoint is matchesPattern for the path of an endpoint that is called by POST.
func matchesEndpoint(pattern, endpoint string) bool {
	return matchesPattern(pattern, endpoint) || matchesPattern(pattern, "POST "+endpoint)
}

// A limitUse is what a call adds to what a value has used in one window of a limit with for_each.
type limitUse struct {
	ofToken                bool   // the limit is the token's, not the project's
	rule                   string // what the limit counts, see limit.rule
	value                  string
	windowStart, windowEnd int64
	amount                 int64 // in the limit's unit; below 0 where less was used than had been counted
}

func (u limitUse) MarshalJSON() ([]byte, error) {
	return json.Marshal([]any{u.ofToken, u.rule, u.value, u.windowStart, u.windowEnd, u.amount})
}

func (u *limitUse) UnmarshalJSON(text []byte) error {
	fields := []any{&u.ofToken, &u.rule, &u.value, &u.windowStart, &u.windowEnd, &u.amount}
	return json.Unmarshal(text, &fields)
}
