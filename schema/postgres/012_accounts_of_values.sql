-- The functions of limits' accounts, changed: an account that is made again begins without the leases that a deleted one
-- has left, and of a replica that has died, a limit for each value of an attribute counts the calls with that value only.

-- lease_sync makes one exchange of a replica: reports, requests and grants for many counters. It returns nothing if the
-- replica is closed, or if a later exchange has been made. Accounts are locked in their order, so that no two exchanges
-- wait for each other in a circle.
CREATE OR REPLACE FUNCTION lease_sync(p_replica bigint, p_epoch bigint, p_number bigint, p_channel text, p_items text)
RETURNS TABLE (o_item bigint, o_status bigint, o_incarnation bigint, o_window_start bigint, o_spent bigint,
	o_unspent bigint, o_others bigint, o_free bigint, o_level bigint, o_settled boolean, o_recalled boolean)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
	i record;
	acc limit_accounts%ROWTYPE;
	own limit_leases%ROWTYPE;
	now_ms bigint := (extract(epoch FROM clock_timestamp()) * 1000)::bigint;
	replicas_open bigint;
	spent_by_others numeric;
	unspent_of_others numeric;
	busy_of_others numeric;
	available numeric;
	delta bigint;
	granted bigint;
	made bigint;
	recalls boolean;
BEGIN
	PERFORM 1 FROM replicas r WHERE r.id = p_replica AND r.epoch = p_epoch AND r.closed_at IS NULL FOR SHARE;
	IF NOT FOUND THEN
		RETURN;
	END IF;
	INSERT INTO lease_exchanges AS e (replica, number) VALUES (p_replica, p_number)
		ON CONFLICT (replica) DO UPDATE SET number = p_number WHERE e.number < p_number;
	IF NOT FOUND THEN
		RETURN;
	END IF;
	SELECT count(*) INTO replicas_open FROM replicas r WHERE r.closed_at IS NULL;
	FOR i IN
		SELECT x.* FROM jsonb_to_recordset(p_items::jsonb) AS x (i bigint, account text, project bigint, token bigint,
			rule text, kind bigint, period bigint, version bigint, max bigint, window_start bigint, window_end bigint,
			incarnation bigint, base bigint, added boolean, spent bigint, busy bigint, keep bigint, recent bigint,
			recent_from bigint, least bigint, need bigint, want bigint, asked boolean)
		ORDER BY x.account COLLATE "C"
	LOOP
		o_item := i.i;
		o_status := 0;
		IF i.window_start > now_ms + 2000 THEN
			o_status := 3;
			RETURN NEXT;
			CONTINUE;
		END IF;

		-- The account, made or made again if need be.
		SELECT a.* INTO acc FROM limit_accounts a WHERE a.account = i.account FOR UPDATE;
		IF NOT FOUND OR i.added AND i.version > acc.version THEN
			IF i.base IS NULL THEN
				o_status := 1;
				RETURN NEXT;
				CONTINUE;
			END IF;
			made := nextval('limit_incarnations');
			INSERT INTO limit_accounts AS a (account, project, token, rule, kind, period_ms, incarnation, version, max,
				window_start, window_end, base, level, level_at, recall, recalled_at)
			VALUES (i.account, i.project, i.token, i.rule, i.kind, i.period, made, i.version,
				i.max, i.window_start, i.window_end, i.base, 0, now_ms, 0, 0)
			ON CONFLICT (account) DO UPDATE SET incarnation = excluded.incarnation, version = excluded.version,
				max = excluded.max, window_start = excluded.window_start, window_end = excluded.window_end,
				base = excluded.base, level = 0, level_at = now_ms
				WHERE i.added AND excluded.version > a.version;
			SELECT a.* INTO acc FROM limit_accounts a WHERE a.account = i.account FOR UPDATE;
			IF acc.incarnation = made THEN -- and not made by another replica just now
				DELETE FROM limit_leases l WHERE l.account = i.account;
			END IF;
		END IF;
		recalls := false;
		IF i.version > acc.version THEN
			recalls := i.max < acc.max;
			acc.version := i.version;
			acc.max := i.max;
		END IF;
		IF i.window_start < acc.window_start THEN
			o_status := 2;
			o_window_start := acc.window_start;
			RETURN NEXT;
			CONTINUE;
		END IF;
		IF i.window_start > acc.window_start THEN
			DELETE FROM limit_leases l WHERE l.account = i.account;
			acc.window_start := i.window_start;
			acc.window_end := i.window_end;
			acc.base := 0;
		ELSIF i.kind > 0 AND i.window_end > acc.window_end THEN
			acc.window_end := i.window_end;
		END IF;

		-- The report. A counter that joins the account goes on where the replica's last counter has ended.
		SELECT l.* INTO own FROM limit_leases l WHERE l.account = i.account AND l.replica = p_replica;
		IF NOT FOUND THEN
			own.account := i.account;
			own.replica := p_replica;
			own.spent := 0;
			own.unspent := 0;
			own.seen_recall := acc.recall;
		END IF;
		delta := i.spent - own.spent;
		IF i.incarnation <> acc.incarnation THEN
			delta := 0;
			own.unspent := 0;
			own.seen_recall := acc.recall;
		END IF;
		IF i.kind = 1 THEN
			acc.level := greatest(0, acc.level - least(greatest(now_ms - acc.level_at, 0), 2 * i.period) * acc.max);
			acc.level_at := greatest(now_ms, acc.level_at);
		END IF;
		own.spent := own.spent + delta;
		IF i.kind = 1 AND delta < 0 THEN -- what has refilled cannot come back
			delta := greatest(delta, -(acc.level / i.period));
		END IF;
		own.unspent := greatest(least(own.unspent - delta, i.keep), i.busy);
		own.busy := i.busy;
		own.recent := i.recent;
		own.recent_from := i.recent_from;
		IF i.kind = 1 AND delta > 0 THEN
			acc.level := greatest(acc.level, least(acc.level + least(delta, 4 * acc.max) * i.period,
				2 * acc.max * i.period));
		ELSIF i.kind = 1 THEN
			acc.level := acc.level + delta * i.period;
		END IF;

		-- The grant.
		SELECT coalesce(sum(l.spent), 0), coalesce(sum(l.unspent), 0), coalesce(sum(l.busy), 0)
		INTO spent_by_others, unspent_of_others, busy_of_others
		FROM limit_leases l WHERE l.account = i.account AND l.replica <> p_replica;
		available := acc.max - unspent_of_others - own.unspent;
		IF i.kind = 0 THEN
			available := available - acc.base - spent_by_others - own.spent;
		ELSIF i.kind = 1 THEN
			available := available - ceil(acc.level::numeric / i.period);
		END IF;
		granted := 0;
		IF i.least > 0 AND i.least <= available THEN
			granted := least(available, CASE WHEN now_ms - acc.recalled_at < 500 THEN i.need
				ELSE greatest(i.need, least(i.want, floor(available / (2 * replicas_open)))) END);
		ELSIF i.least > 0 THEN
			recalls := recalls OR NOT i.asked;
		ELSIF i.want > 0 AND now_ms - acc.recalled_at >= 500 THEN
			granted := greatest(0, least(i.want, floor(available / (2 * replicas_open))));
		END IF;
		own.unspent := own.unspent + granted;
		available := available - granted;
		IF recalls THEN
			acc.recall := acc.recall + 1;
			acc.recalled_at := now_ms;
		END IF;
		o_recalled := own.unspent > own.busy AND own.seen_recall < acc.recall AND i.keep > i.busy;
		IF i.keep <= i.busy THEN
			own.seen_recall := acc.recall;
		END IF;
		o_settled := NOT EXISTS (SELECT 1 FROM limit_leases l JOIN replicas r ON r.id = l.replica
			WHERE l.account = i.account AND l.replica <> p_replica AND l.unspent > 0 AND l.seen_recall < acc.recall
				AND r.closed_at IS NULL);
		IF recalls AND NOT o_settled THEN
			PERFORM pg_notify(p_channel, 'recall ' || i.account);
		END IF;

		UPDATE limit_accounts a SET version = acc.version, max = acc.max, window_start = acc.window_start,
			window_end = acc.window_end, base = acc.base, level = acc.level, level_at = acc.level_at,
			recall = acc.recall, recalled_at = acc.recalled_at
		WHERE a.account = i.account AND (a.version, a.max, a.window_start, a.window_end, a.base, a.level, a.level_at,
			a.recall) IS DISTINCT FROM (acc.version, acc.max, acc.window_start, acc.window_end, acc.base, acc.level,
			acc.level_at, acc.recall);
		INSERT INTO limit_leases AS l (account, replica, spent, unspent, busy, recent, recent_from, seen_recall)
		VALUES (own.account, p_replica, own.spent, own.unspent, own.busy, own.recent, own.recent_from, own.seen_recall)
		ON CONFLICT (account, replica) DO UPDATE SET spent = excluded.spent, unspent = excluded.unspent,
			busy = excluded.busy, recent = excluded.recent, recent_from = excluded.recent_from,
			seen_recall = excluded.seen_recall;
		o_incarnation := acc.incarnation;
		o_window_start := acc.window_start;
		o_spent := own.spent;
		o_unspent := own.unspent;
		o_others := least(CASE i.kind WHEN 2 THEN busy_of_others ELSE acc.base + spent_by_others END,
			1000000000000000000);
		o_free := greatest(least(available, 1000000000000000000), -1000000000000000000);
		o_level := acc.level;
		RETURN NEXT;
	END LOOP;
END $$;

-- lease_account returns the name of the account of a value, beside that of another value: see accountName. It is NULL if
-- the value is not known: the ledger has replaced a character.
CREATE FUNCTION lease_account(acc limit_accounts, p_value text) RETURNS text
LANGUAGE sql STABLE AS $$
	SELECT CASE WHEN strpos(p_value, U&'\FFFD') = 0 THEN split_part(acc.account, '/', 1) || '/' || translate(encode(
		substr(sha256(convert_to(acc.rule || p_value, 'UTF8')), 1, 18), 'base64'), '+/', '-_') END
$$;

-- lease_tag returns the value of a tag, '' if there is none, NULL if it is not known.
CREATE FUNCTION lease_tag(p_tags text, p_key text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
	SELECT CASE WHEN p_tags = '' THEN '' WHEN strpos(p_tags, '\u') = 0 THEN coalesce(p_tags::jsonb ->> p_key, '') END
$$;

-- lease_use returns what the ledger has of calls of the replica with a slot in an account. Of requests, those that began
-- at p_from or later; of tokens and dollars, what those have used that ended after the report at p_from, or never. Of a
-- limit for each value of an attribute, only calls with the account's value count, and those whose value is not known.
-- What models a limit is for does not matter.
CREATE OR REPLACE FUNCTION lease_use(acc limit_accounts, p_from bigint, p_slot bigint) RETURNS bigint
LANGUAGE sql STABLE AS $$
	SELECT least(coalesce(sum(CASE rule.count WHEN 'requests' THEN 1 WHEN 'dollars' THEN r.cost
		ELSE r.input_tokens + r.output_tokens END), 0), 1000000000000000000)::bigint
	FROM (SELECT acc.rule::jsonb ->> 'count' AS count, coalesce(acc.rule::jsonb ->> 'endpoint', '') AS pattern,
			acc.rule::jsonb ->> 'for_each' AS attribute) rule,
		requests r, split_part(r.endpoint, ' ', 2) AS path
	WHERE r.id >= (CASE rule.count WHEN 'requests' THEN p_from ELSE p_from - 3600000 END) << 21
		AND r.id >> 11 & 1023 = p_slot
		AND (rule.count = 'requests' OR r.outcome = 'lost' OR (r.id >> 21) + r.total_us / 1000 >= p_from + 5000)
		AND r.project = acc.project AND acc.token IN (0, r.token) AND r.outcome <> 'refused'
		AND (pattern = '' OR pattern IN (r.endpoint, path) OR right(pattern, 1) = '*'
			AND (starts_with(r.endpoint, left(pattern, -1)) OR starts_with(path, left(pattern, -1))))
		AND (attribute IS NULL OR r.model = '' OR coalesce(lease_account(acc, CASE attribute WHEN 'session' THEN r.session
			WHEN 'end_user' THEN r.end_user ELSE lease_tag(r.tags, substr(attribute, 5)) END) = acc.account, true))
$$;
