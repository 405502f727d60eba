// SQL for the hours of projects: what the dashboard shows of errors and latency.
// It is written with the sums, in the transaction that settles the calls.
package main

import (
	"context"
	"database/sql/driver"
	"fmt"
)

// An hourKey names a row of project_hours.
type hourKey struct{ project, at int64 }

// An hourSum is what a row of project_hours adds up.
type hourSum struct {
	calls, input, output, cost, unpriced int64
	errors                               [errorClasses]int64
	first, total                         latencies
}

// hourColumns is how many columns an hourSum fills.
const hourColumns = 5 + errorClasses + 2*buckets

const errorClasses = 4

// hourClasses are the columns of errors, in their order.
func hourClasses() [errorClasses]errorClass {
	return [...]errorClass{classCaller, classPolicy, classProvider, classProxy}
}

// add counts a call. s is what the call alone adds to usage_sums.
func (h *hourSum) add(r *requestRow) {
	var s sum
	s.add(r)
	h.calls, h.input, h.output, h.cost, h.unpriced = h.calls+1, h.input+s.input, h.output+s.output, h.cost+s.cost, h.unpriced+s.unpriced
	class := r.class()
	for i, c := range hourClasses() {
		if c == class {
			h.errors[i]++
		}
	}
	if r.outcome == outcomeOK && r.attempts > 0 && r.firstByteUS >= 0 {
		h.first.add(r.firstByteUS)
		h.total.add(r.totalUS)
	}
}

func (h *hourSum) merge(o *hourSum) {
	to := h.columns()
	for i, v := range o.columns() {
		*to[i] += *v
	}
}

// columns returns where the values of h stand, in the order of the statements.
func (h *hourSum) columns() [hourColumns]*int64 {
	c := [hourColumns]*int64{&h.calls, &h.input, &h.output, &h.cost, &h.unpriced}
	n := 5
	for i := range h.errors {
		c[n], n = &h.errors[i], n+1
	}
	for i := range h.first {
		c[n], c[n+buckets] = &h.first[i], &h.total[i]
		n++
	}
	return c
}

// values are what hourStatement takes.
func (h *hourSum) values(k hourKey) []driver.Value {
	out := append(make([]driver.Value, 0, 2+hourColumns), k.project, k.at)
	for _, v := range h.columns() {
		out = append(out, *v)
	}
	return out
}

const hourStatement = `
	INSERT INTO project_hours (project, at,
		calls, input_tokens, output_tokens, cost, unpriced_calls, caller_errors, policy_errors, provider_errors, proxy_errors, f10,
		f16, f25, f40, f63, f100, f160, f250, f400, f630, f1000, f1600, f2500, f4000, f6300, f10000, f16000, f25000, f40000, f63000,
		f100000, f_more, t10, t16, t25, t40, t63, t100, t160, t250, t400, t630, t1000, t1600, t2500, t4000, t6300, t10000, t16000,
		t25000, t40000, t63000, t100000, t_more)
	VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
	ON CONFLICT DO UPDATE SET
		calls = calls + excluded.calls, input_tokens = input_tokens + excluded.input_tokens,
		output_tokens = output_tokens + excluded.output_tokens, cost = cost + excluded.cost,
		unpriced_calls = unpriced_calls + excluded.unpriced_calls, caller_errors = caller_errors + excluded.caller_errors,
		policy_errors = policy_errors + excluded.policy_errors, provider_errors = provider_errors + excluded.provider_errors,
		proxy_errors = proxy_errors + excluded.proxy_errors, f10 = f10 + excluded.f10, f16 = f16 + excluded.f16,
		f25 = f25 + excluded.f25, f40 = f40 + excluded.f40, f63 = f63 + excluded.f63, f100 = f100 + excluded.f100,
		f160 = f160 + excluded.f160, f250 = f250 + excluded.f250, f400 = f400 + excluded.f400, f630 = f630 + excluded.f630,
		f1000 = f1000 + excluded.f1000, f1600 = f1600 + excluded.f1600, f2500 = f2500 + excluded.f2500, f4000 = f4000 + excluded.f4000,
		f6300 = f6300 + excluded.f6300, f10000 = f10000 + excluded.f10000, f16000 = f16000 + excluded.f16000,
		f25000 = f25000 + excluded.f25000, f40000 = f40000 + excluded.f40000, f63000 = f63000 + excluded.f63000,
		f100000 = f100000 + excluded.f100000, f_more = f_more + excluded.f_more, t10 = t10 + excluded.t10, t16 = t16 + excluded.t16,
		t25 = t25 + excluded.t25, t40 = t40 + excluded.t40, t63 = t63 + excluded.t63, t100 = t100 + excluded.t100,
		t160 = t160 + excluded.t160, t250 = t250 + excluded.t250, t400 = t400 + excluded.t400, t630 = t630 + excluded.t630,
		t1000 = t1000 + excluded.t1000, t1600 = t1600 + excluded.t1600, t2500 = t2500 + excluded.t2500, t4000 = t4000 + excluded.t4000,
		t6300 = t6300 + excluded.t6300, t10000 = t10000 + excluded.t10000, t16000 = t16000 + excluded.t16000,
		t25000 = t25000 + excluded.t25000, t40000 = t40000 + excluded.t40000, t63000 = t63000 + excluded.t63000,
		t100000 = t100000 + excluded.t100000, t_more = t_more + excluded.t_more`

const hourTotals = `
		coalesce(sum(calls), 0), coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), coalesce(sum(cost), 0),
		coalesce(sum(unpriced_calls), 0), coalesce(sum(caller_errors), 0), coalesce(sum(policy_errors), 0),
		coalesce(sum(provider_errors), 0), coalesce(sum(proxy_errors), 0), coalesce(sum(f10), 0), coalesce(sum(f16), 0),
		coalesce(sum(f25), 0), coalesce(sum(f40), 0), coalesce(sum(f63), 0), coalesce(sum(f100), 0), coalesce(sum(f160), 0),
		coalesce(sum(f250), 0), coalesce(sum(f400), 0), coalesce(sum(f630), 0), coalesce(sum(f1000), 0), coalesce(sum(f1600), 0),
		coalesce(sum(f2500), 0), coalesce(sum(f4000), 0), coalesce(sum(f6300), 0), coalesce(sum(f10000), 0), coalesce(sum(f16000), 0),
		coalesce(sum(f25000), 0), coalesce(sum(f40000), 0), coalesce(sum(f63000), 0), coalesce(sum(f100000), 0),
		coalesce(sum(f_more), 0), coalesce(sum(t10), 0), coalesce(sum(t16), 0), coalesce(sum(t25), 0), coalesce(sum(t40), 0),
		coalesce(sum(t63), 0), coalesce(sum(t100), 0), coalesce(sum(t160), 0), coalesce(sum(t250), 0), coalesce(sum(t400), 0),
		coalesce(sum(t630), 0), coalesce(sum(t1000), 0), coalesce(sum(t1600), 0), coalesce(sum(t2500), 0), coalesce(sum(t4000), 0),
		coalesce(sum(t6300), 0), coalesce(sum(t10000), 0), coalesce(sum(t16000), 0), coalesce(sum(t25000), 0),
		coalesce(sum(t40000), 0), coalesce(sum(t63000), 0), coalesce(sum(t100000), 0), coalesce(sum(t_more), 0)`

// hoursOf adds up the hours of a project, or of all together (project 0), that
// begin in from <= at < to.
func (s *store) hoursOf(ctx context.Context, project, from, to int64) (*hourSum, error) {
	h := &hourSum{}
	if err := s.read.QueryRowContext(ctx, `SELECT `+hourTotals+` FROM project_hours WHERE project = ? AND at >= ? AND at < ?`,
		project, from, to).Scan(h.fields()...); err != nil {
		return nil, fmt.Errorf("adding up hours: %w", err)
	}
	return h, nil
}

func (h *hourSum) fields() []any {
	out := make([]any, 0, hourColumns)
	for _, v := range h.columns() {
		out = append(out, v)
	}
	return out
}

// forgetHours deletes the hours of up to limit projects from before a time, and
// returns how many rows went.
func (s *store) forgetHours(ctx context.Context, before int64, limit int) (int64, error) {
	res, err := s.write.ExecContext(ctx, `
		DELETE FROM project_hours WHERE at < ?1 AND project IN (
			SELECT seq FROM (SELECT 0 AS seq UNION ALL SELECT seq FROM projects) p
			WHERE EXISTS (SELECT 1 FROM project_hours h WHERE h.project = p.seq AND h.at < ?1) LIMIT ?2)`, before, limit)
	if err != nil {
		return 0, fmt.Errorf("deleting old hours: %w", err)
	}
	return res.RowsAffected()
}
