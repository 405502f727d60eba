// The pages of /admin about a project's provider keys. A key comes in here and is
// never shown again: of a stored one there are the last 4 characters.
package main

import (
	"encoding/json"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// upstreamFields are those that a new upstream and a changed one have in common.
func upstreamFields() []*field {
	return []*field{
		{Name: "models", Label: "Models", Kind: "textarea", Placeholder: "gpt-4o*", Help: "Which models it serves, one a line; * at the end stands for any rest. Empty: all."},
		{Name: "priority", Label: "Priority", Kind: "number", Short: true, Required: true, Help: "Calls go to the lowest number that serves their model."},
		{Name: "weight", Label: "Weight", Kind: "number", Short: true, Required: true, Help: "Keys of one priority share the calls in this proportion; 0: none."},
		{Name: "rewrite", Label: "Its own names for models", Kind: "textarea", Placeholder: "gpt-4o = my-deployment", Help: "What clients ask for = what is sent, one a line. Empty: the same."},
		{Name: "requests_per_minute", Label: "Requests per minute", Kind: "number", Short: true, Help: "That the provider takes. Beyond them calls go to the next key. Empty: not known."},
		{Name: "tokens_per_minute", Label: "Tokens per minute", Kind: "number", Short: true, Help: "The same, in tokens."},
		{Name: "connect_ms", Label: "Connected within, ms", Kind: "number", Short: true, Help: "Name look-up, dialling and TLS handshake; a call that has no connection by then goes to the next key. Empty: 10000 each."},
		{Name: "answer_ms", Label: "Answer within, ms", Kind: "number", Short: true, Help: "An answer in one piece that has not begun by then goes to the next key; without one, the call ends. Empty: the program's own."},
		{Name: "first_event_ms", Label: "First event within, ms", Kind: "number", Short: true, Help: "A stream that begins later goes to the next key. Empty: the program's own."},
		{Name: "idle_ms", Label: "Pauses at most, ms", Kind: "number", Short: true, Help: "Empty: the program's own."},
		{Name: "shared_with", Label: "Serves other projects too", Kind: "textarea", Placeholder: "proj_…", Help: "Their ids, one a line. They use the key, and never see it."},
		{Name: "note", Label: "Note", Kind: "text", Help: "For administrators, such as whose account it is."},
		{Name: "organization", Label: "OpenAI organisation", Kind: "text", Placeholder: "org-…", Help: "Sent along as OpenAI-Organization."},
		{Name: "openai_project", Label: "OpenAI project", Kind: "text", Placeholder: "proj_…", Help: "Sent along as OpenAI-Project."},
	}
}

// upstreamInputOf reads what the fields in common say.
func upstreamInputOf(form url.Values) (map[string]any, error) {
	in := map[string]any{"name": form.Get("name"), "models": splitLines(form.Get("models")),
		"organization": strings.TrimSpace(form.Get("organization")), "openai_project": strings.TrimSpace(form.Get("openai_project"))}
	setNumber(in, form, "priority", false)
	setNumber(in, form, "weight", false)
	setText(in, form, "api_key", false)
	in["shared_with"] = splitLines(form.Get("shared_with"))
	in["note"] = strings.TrimSpace(form.Get("note"))
	for _, name := range []string{"requests_per_minute", "tokens_per_minute", "connect_ms", "answer_ms", "first_event_ms", "idle_ms"} {
		in[name] = 0
		setNumber(in, form, name, false)
	}
	names := map[string]string{}
	for _, line := range splitLines(form.Get("rewrite")) {
		asked, sent, ok := strings.Cut(line, "=")
		if !ok {
			return nil, &fieldError{"rewrite", "must have lines such as gpt-4o = my-deployment"}
		}
		names[strings.TrimSpace(asked)] = strings.TrimSpace(sent)
	}
	in["rewrite"] = names
	return in, nil
}

// rewriteLines writes an upstream's own names for models one a line.
func rewriteLines(raw json.RawMessage) string {
	var names map[string]string
	if err := json.Unmarshal(raw, &names); err != nil { // cannot be: it was checked when it was stored
		return ""
	}
	var b strings.Builder
	for _, asked := range slices.Sorted(maps.Keys(names)) {
		b.WriteString(asked + " = " + names[asked] + "\n")
	}
	return b.String()
}

// positive writes a number that means nothing when it is 0.
func positive(n int64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

// newUpstreamPage adds a provider key to a project.
func (s *server) newUpstreamPage(r *pageRequest) (*page, error) {
	rep, err := s.getProject(r.asking())
	if err != nil {
		return nil, err
	}
	project := rep.body.(projectView)
	here := "/admin/projects/" + project.ID
	v := &formView{Crumb: &option{here, project.Name}, Form: &pageForm{Action: here + "/upstreams/new", Submit: "Add the key", Cancel: here,
		Fields: append([]*field{
			{Name: "name", Label: "Name", Kind: "text", Required: true, Help: "To tell it from the project's other keys."},
			providerField(),
			keyField("It is sealed, and never shown again.", true),
			{Name: "base_url", Label: "Base URL", Kind: "text", Placeholder: "https://", Help: baseURLHelp},
		}, upstreamFields()...)}}
	v.Form.fill(r.form, url.Values{"priority": {"0"}, "weight": {"1"}})
	p := &page{template: "form", title: "Add a provider key", data: v}
	if !r.posted() {
		return p, nil
	}
	in, err := upstreamInputOf(r.form)
	if err == nil {
		in["provider"] = r.form.Get("provider")
		setText(in, r.form, "base_url", false)
		_, err = s.createUpstream(r.with(in))
	}
	if err != nil {
		p.status, err = v.refused(err)
		return p, err
	}
	return goTo(here, "saved"), nil
}

// editUpstream changes an upstream, and replaces its key if one is given.
func (s *server) editUpstream(r *pageRequest) (*page, error) {
	rep, err := s.getUpstream(r.asking())
	if err != nil {
		return nil, err
	}
	u := rep.body.(upstreamView)
	here := "/admin/projects/" + u.ProjectID
	key := keyField("Empty: the key that is stored stays. A new base URL needs the key anew.", false)
	key.Label = "New provider key"
	if u.KeyHint != "" {
		key.Placeholder = "•••• " + u.KeyHint
	}
	v := &formView{Crumb: &option{here, "Project"}, Form: &pageForm{Action: here + "/upstreams/" + u.ID + "/edit", Submit: "Save", Cancel: here, Version: u.Version,
		Fields: append([]*field{
			{Name: "name", Label: "Name", Kind: "text", Required: true},
			key,
			{Name: "base_url", Label: "Base URL", Kind: "text", Required: true},
			{Name: "is_active", Label: "In use", Kind: "checkbox", Help: "Without it no call goes there; the key is kept."},
		}, upstreamFields()...)}}
	stored := url.Values{"name": {u.Name}, "base_url": {u.BaseURL}, "organization": {u.Organization}, "openai_project": {u.OpenAIProject},
		"priority": {strconv.FormatInt(u.Priority, 10)}, "weight": {strconv.FormatInt(u.Weight, 10)}, "models": {linesOf(u.Models)},
		"rewrite": {rewriteLines(u.Rewrite)}, "note": {u.Note}, "shared_with": {linesOf(u.SharedWith)}, "requests_per_minute": {positive(u.Requests)}, "tokens_per_minute": {positive(u.Tokens)},
		"connect_ms": {positive(u.ConnectMS)}, "answer_ms": {positive(u.AnswerMS)}, "first_event_ms": {positive(u.FirstEventMS)}, "idle_ms": {positive(u.IdleMS)}}
	if u.IsActive {
		stored.Set("is_active", "on")
	}
	v.Form.fill(r.form, stored)
	p := &page{template: "form", title: "Provider key " + u.Name, data: v}
	if !r.posted() {
		return p, nil
	}
	v.Form.Version = r.match
	in, err := upstreamInputOf(r.form)
	if err == nil {
		in["base_url"], in["is_active"] = r.form.Get("base_url"), r.form.Get("is_active") != ""
		_, err = s.patchUpstream(r.with(in))
	}
	if err != nil {
		p.status, err = v.refused(err)
		return p, err
	}
	return goTo(here, "saved"), nil
}

// linesOf writes a stored JSON list one entry a line.
func linesOf(raw json.RawMessage) string {
	var l []string
	if err := json.Unmarshal(raw, &l); err != nil { // cannot be: it was checked when it was stored
		return ""
	}
	return strings.Join(l, "\n")
}

// removeUpstream deletes an upstream.
func (s *server) removeUpstream(r *pageRequest) (*page, error) {
	rep, err := s.getUpstream(r.asking())
	if err != nil {
		return nil, err
	}
	u := rep.body.(upstreamView)
	here := "/admin/projects/" + u.ProjectID
	if !r.posted() {
		return r.confirm("Remove the provider key "+u.Name+"?", "The key is wiped, for good. Calls go to the project's other keys; without any they are refused.", "Remove the key", here), nil
	}
	if _, err := s.deleteUpstream(r.with(nil)); err != nil {
		return nil, err
	}
	return goTo(here, "deleted"), nil
}
